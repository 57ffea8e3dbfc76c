"""From a dataset to batches on the device: sample order, crops, reading ahead, disk cache, loader."""
