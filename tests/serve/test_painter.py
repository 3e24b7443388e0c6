"""Orders are painted together and come out as when painted alone."""

from __future__ import annotations

import numpy as np
import pytest

from diffc.errors import DiffcError, UsageError
from diffc.serve.orders import Order
from diffc.serve.painter import Painter
from tests.conftest import Cells
from tests.runtime.test_load import SMALL


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_company_does_not_change_a_picture(compiled: Cells) -> None:
    """Seeds and settings are each order's own. Without `fill`, rounding moves a value by a step of 1/255 at most."""
    artifact = compiled("digits-sd3", "none", **SMALL).folder
    asked = [Order(f"a handwritten {word}", seed=n, steps=2) for n, word in enumerate(("two", "six", "nine"))]
    asked[1] = Order("a handwritten six", seed=1, steps=3, width=96)
    painter, filled = Painter(artifact, max_batch=2), Painter(artifact, max_batch=2, fill=True)
    alone = [painter.paint([order])[0] for order in asked]
    assert [picture.shape for picture in alone] == [(64, 64, 3), (64, 96, 3), (64, 64, 3)]
    assert all(apart(a, b) <= 1 for a, b in zip(alone, painter.paint(asked), strict=True))
    assert apart(alone[0], alone[2]) > 50
    one, both = filled.paint(asked[:1])[0], filled.paint([asked[2], asked[0]])
    assert np.array_equal(one, both[1])
    other = painter.paint([Order("a handwritten two", seed=9, steps=2)])[0]
    assert apart(other, alone[0]) > 20
    small = Order("a fox", height=60)
    with pytest.raises(UsageError, match="multiple"):
        painter.check(small)
    wrong = painter.answers([asked[0], Order("a fox", steps=1, height=4096), asked[2]])
    assert isinstance(wrong[1], DiffcError)
    assert isinstance(wrong[0], np.ndarray)
    assert apart(wrong[0], alone[0]) <= 1
    painter.close()
    filled.close()


def test_a_batch_has_pictures() -> None:
    with pytest.raises(UsageError, match="max_batch is 0"):
        Painter("anywhere", max_batch=0)
