"""Tests of `diffc/commands/export`."""
