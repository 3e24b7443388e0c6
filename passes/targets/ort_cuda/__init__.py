"""Fusions for target ort-cuda: what the CUDA kernels of ONNX Runtime compute in one step."""
