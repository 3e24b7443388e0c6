"""Passes that bring an ONNX file from another exporter to the canonical form."""
