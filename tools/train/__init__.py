"""Training of the embedded models whose name starts with `digits-`."""
