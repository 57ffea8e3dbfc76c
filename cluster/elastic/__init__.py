"""Training on Ray Train: failures, scaling and preemption notices."""
