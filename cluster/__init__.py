"""What makes it many machines: Ray Train, and the command line that people type."""
