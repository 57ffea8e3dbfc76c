"""The training loop and its three tasks: pre-training, fine-tuning, linear probing."""
