"""Connecting to Ray, and running many small tasks on it."""
