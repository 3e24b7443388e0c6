"""The configurations of released models."""

from __future__ import annotations

import numpy as np
import pytest

from diffc.models.embedded.random_model import shapes_of
from diffc.models.embedded.real import REAL


@pytest.mark.parametrize("name", REAL)
def test_the_configuration_has_the_parameters_of_the_release(name: str) -> None:
    """SDXL 2.57 B, SD3 2.03 B, SD3.5 2.24 B, FLUX 11.9 B; a table of positions is stored beside them."""
    model = REAL[name]
    sizes = {key: np.prod(shape, dtype=np.int64) for key, shape in shapes_of(model).items()}
    buffers = sizes.pop("pos_embed.pos_embed", 0)
    assert sum(sizes.values()) == model.parameters
    assert buffers == {"sd3-medium": 192**2 * 1536, "sd35-medium": 384**2 * 1536}.get(name, 0)
