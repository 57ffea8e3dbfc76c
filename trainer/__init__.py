"""The MAE, its training loops and its evaluations. Knows pipeline/, and nothing of Ray."""
