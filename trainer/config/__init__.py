"""Typed config of a run.

schema          one model per task (PretrainConfig, FinetuneConfig, LinprobeConfig) and the keys they share
model_schema    architecture: encoder, masked autoencoder, classifier
optim_schema    optimizers, learning-rate schedules, augmentation of labelled batches
recipe          read YAML recipes with key=value overrides; compare configs when a run is resumed
device          device, precision and compilation that a config selects

Unknown keys and impossible values are refused with one message. Keys that affect the result cannot change on resume.
"""
