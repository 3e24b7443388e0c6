"""ONNX Runtime: sessions over numpy arrays and over torch tensors."""
