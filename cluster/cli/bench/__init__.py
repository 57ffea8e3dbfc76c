"""`maestream bench`: measure the loader, the training step, and both together."""
