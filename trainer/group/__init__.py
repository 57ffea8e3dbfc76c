"""The process group of a run's workers, which is rebuilt while they train when a worker is lost or joins."""
