"""ModelOpt quantization: formats, where quantizers go, calibration, and checkpoints that keep the result."""
