"""From a torch backbone to an ONNX graph whose weights are recipes, without allocating a weight."""
