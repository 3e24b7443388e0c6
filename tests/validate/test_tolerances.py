"""The table of tolerances is tight and complete."""

from __future__ import annotations

import pytest

from diffc.errors import DiffcError
from diffc.quantize.formats import FORMATS, MIXED
from diffc.validate.tolerances import MAX_REL_L2, PASS_REL_L2, UNROUNDED_REL_L2, tolerance_of


def test_the_tolerances_are_tight_and_complete():
    formats = {**FORMATS, MIXED.name: MIXED}
    assert {fmt for fmt, _ in MAX_REL_L2} == set(formats)
    for (fmt, dtype), limit in MAX_REL_L2.items():
        assert tolerance_of(fmt, dtype) == limit
        four_bits = formats[fmt].input_bits == 4
        assert limit <= ((5e-3 if four_bits else 2e-3) if dtype == "float32" else 5e-2 if four_bits else 2e-2)
    assert max(PASS_REL_L2, UNROUNDED_REL_L2) <= min(MAX_REL_L2.values())
    with pytest.raises(DiffcError, match=r"fp9/float32.*Known: none/float32"):
        tolerance_of("fp9", "float32")
