"""The environment of optimum-onnx's pipelines, and images from it. Both scripts run without diffc."""
