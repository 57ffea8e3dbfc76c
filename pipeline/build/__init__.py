"""Build a dataset: find the images of a source, and write them as WebDataset shards."""
