"""Tests mirror the tree: one file for each source file, one folder for each room."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
"""Larger fixtures that lie beside a checkout; tests that read them are skipped where it does not exist."""
