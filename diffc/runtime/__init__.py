"""Running an artifact: sessions over ONNX Runtime and TensorRT engines, and the module that diffusers calls."""
