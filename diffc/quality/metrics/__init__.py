"""Metrics of pictures: by a network that has seen prompts and pictures, and against the pictures of a reference."""
