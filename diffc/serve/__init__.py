"""Serving an artifact's pipeline: orders in batches, and a Ray Serve application around them."""
