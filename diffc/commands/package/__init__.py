"""Packages: an artifact together with everything else that a pipeline needs, in a layout that others load."""
