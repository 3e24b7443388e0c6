"""diffc: a compiler for diffusion backbones."""

__version__ = "0.1.0"
