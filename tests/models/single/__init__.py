"""Tests of `diffc/models/single`."""
