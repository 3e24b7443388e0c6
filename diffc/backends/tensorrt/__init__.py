"""TensorRT and TensorRT-RTX: building engines in a process of their own, and running them."""
