"""Tests of diffc.sweep."""
