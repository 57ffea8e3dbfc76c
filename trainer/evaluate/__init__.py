"""Evaluate an encoder or a classifier.

accuracy          top-1, top-5 and loss of a classifier over a whole dataset, each sample exactly once
knn               classification by nearest neighbours
online_knn        the same during pre-training, in the background
features          features and logits of one part of a dataset, for Ray tasks
inference_shard   description of such a part
reconstruct       pictures and error of masked reconstructions
"""
