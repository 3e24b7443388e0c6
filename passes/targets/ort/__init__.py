"""Passes for the own providers of ONNX Runtime."""
