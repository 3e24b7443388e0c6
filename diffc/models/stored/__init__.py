"""Weights that a file holds quantized: codes and scales of each layer as recipes, by the layout of who wrote them."""
