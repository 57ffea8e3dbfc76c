"""A dataset of WebDataset shards: its manifest and indexes, and how to open, index, verify and repair it."""
