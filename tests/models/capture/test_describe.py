"""Inputs described from calls, without a pipeline."""

from __future__ import annotations

from itertools import product

import torch

from diffc.models.capture.describe import Recorded, Sizes, inputs_of


def _recorded(rows_above: int) -> Recorded:
    """Calls with a table of a row for every 8 pixels, and numbers up to `rows_above` below the number of rows."""
    settings = [
        {"batch": b, "height": h, "width": w, "frames": 1, "text": t}
        for b, h, w, t in product((1, 2), (64, 96), (128, 160), (32, 48))
    ]
    calls = [
        {
            ("table",): torch.randn(s["height"] // 8, 4),
            ("rows",): torch.arange(s["height"] // 8 - rows_above).repeat(s["width"] // 8)[None],
        }
        for s in settings
    ]
    return Recorded(settings, calls)


def test_numbers_of_rows_are_bound_by_the_rows() -> None:
    sizes = Sizes()
    table, rows = inputs_of(_recorded(0), {}, sizes)[0]
    assert (table.bound, rows.bound) == (None, table.dims[0])
    assert rows.kind == "positions"


def test_numbers_that_reach_no_dimension_are_not_bound() -> None:
    table, rows = inputs_of(_recorded(3), {}, Sizes())[0]
    assert (table.bound, rows.bound) == (None, None)
