"""Passes that bring the canonical form to what one target takes."""
