"""Passes that cut a graph for cache diffusion."""
