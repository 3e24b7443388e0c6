"""Training of quantized backbones: distillation from the unquantized one (QAD), and on data (QAT)."""
