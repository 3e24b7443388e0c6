"""Readers of model files: each one finds a backbone and returns a ModelSource."""
