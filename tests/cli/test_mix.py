"""Sizes as people write them."""

from __future__ import annotations

import pytest

from diffc.cli.mix import bytes_of
from diffc.errors import UsageError


def test_sizes_have_units() -> None:
    sizes = {"6GB": 6_000_000_000, "800 mb": 800_000_000, "5.5GiB": 5.5 * 1024**3, "2k": 2000}
    assert {text: bytes_of(text) for text in sizes} == sizes
    for text in ("6", "GB", "1.2.3GB", "6 gigabytes"):
        with pytest.raises(UsageError, match="--size is"):
            bytes_of(text)
