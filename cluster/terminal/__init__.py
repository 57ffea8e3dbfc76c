"""Console output and progress bars."""
