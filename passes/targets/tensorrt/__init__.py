"""Passes for TensorRT and TensorRT-RTX."""
