"""Tests of `diffc/models/stored`."""
