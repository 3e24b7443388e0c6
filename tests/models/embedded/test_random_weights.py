"""Random weights: every value is fixed by seed, tensor and position."""

from __future__ import annotations

import numpy as np

from diffc.models.embedded import random_weights
from diffc.models.embedded.random_weights import Tensor, values


def test_parts_of_a_tensor_differ_and_do_not_depend_on_how_it_is_cut() -> None:
    tensor = Tensor("w", (random_weights._PART * 2 + 5,), "bfloat16")
    parts = list(values(tensor, "s"))
    assert [part.size for part in parts] == [random_weights._PART, random_weights._PART, 5]
    assert (parts[0].view(np.uint16) != parts[1].view(np.uint16)).mean() > 0.9
    (shorter,) = values(Tensor("w", (1000,), "bfloat16"), "s")
    assert shorter.tobytes() == parts[0][:1000].tobytes()
