"""Evaluate an encoder, or a model with a head for labels.

accuracy          top-1, top-5 and loss of a classifier over a whole dataset, each sample exactly once
predictions       the same for several classes (mAP) and numbers (R², MAE)
knn               prediction of labels by nearest neighbours
online_knn        the same during pre-training, in the background
features          features and predictions of one part of a dataset, for Ray tasks
inference_shard   description of such a part
reconstruct       pictures and error of masked reconstructions
"""
