"""The data pipeline: from image files to batches on the device. Imports neither trainer nor cluster (and so no Ray)."""
