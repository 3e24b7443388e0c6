"""Measurements of time and memory, beside another way of doing the same in the same run."""
