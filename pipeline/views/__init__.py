"""Datasets made of other datasets, without writing images again: views, mixes, and extensions."""
