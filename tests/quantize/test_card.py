"""How the room of a GPU is shared."""

from __future__ import annotations

import pytest

from diffc.quantize.card import MOST, Need, share

GB = 1_000_000_000
FLUX = {str(layer): GB // 10 for layer in range(240)}


@pytest.mark.parametrize(
    ("limit", "need", "weights", "batches", "expected"),
    [
        (4 * GB, Need(2 * GB, GB // 2), FLUX, 9, (3, 430_000_000)),  # 1.68 GB are left, 0.625 a batch
        (4 * GB, Need(2 * GB, GB // 2), FLUX, 2, (2, 1_055_000_000)),
        (4 * GB, Need(2 * GB, GB // 2), FLUX, 1, (1, 1_680_000_000)),  # all of it for weights
        (4 * GB, Need(4 * GB, GB // 2), FLUX, 9, (1, 0)),
        (100 * GB, Need(2 * GB, GB // 2), FLUX, 9, (1, 90 * GB)),  # every weight may stay
        (24 * GB, Need(2 * GB, 0), FLUX, 99, (MOST, 20_080_000_000 - MOST + 1)),
    ],
)
def test_batches_come_first_unless_all_weights_may_stay(
    limit: int, need: Need, weights: dict[str, int], batches: int, expected: tuple[int, int]
) -> None:
    assert share(need, limit, weights, batches) == expected
