"""From images to batches on the device. Knows nothing of models, and nothing of Ray."""
