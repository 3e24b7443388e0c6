"""Passes that every traced model gets, whatever its target."""
