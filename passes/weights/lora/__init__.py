"""Adapter files (LoRA and its kin): their keys, matched with the layers of a model, and what they do to weights."""
