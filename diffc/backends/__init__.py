"""What compiles or runs an ONNX graph: TensorRT, TensorRT-RTX (one engine builder) and ONNX Runtime."""
