"""A run folder: config, checkpoints, snapshots, metrics, events, and the lease on it."""
