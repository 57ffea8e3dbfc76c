"""`maestream shards`: commands for datasets."""
