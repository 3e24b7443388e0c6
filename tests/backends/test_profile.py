"""Profiles, made of shapes or of dimensions."""

from __future__ import annotations

import pytest

from diffc.backends.profile import Profile, ShapeRange
from diffc.errors import DiffcError


def test_dimensions_are_computed_and_names_come_first() -> None:
    """A dimension of an imported graph may be called what looks like a product."""
    dims = {"x": ("batch", "height*width/4", 8), "y": ("2*batch",), "t": ()}
    bounds = [{"batch": n, "height": 4 * n, "width": 6, "2*batch": 5 + n} for n in (1, 2, 3)]
    assert Profile.of_dims(dims, *bounds).inputs == {
        "x": ShapeRange((1, 6, 8), (2, 12, 8), (3, 18, 8)),
        "y": ShapeRange((6,), (7,), (8,)),
        "t": ShapeRange((), (), ()),
    }


def test_bounds_name_the_same_inputs() -> None:
    with pytest.raises(DiffcError, match="do not name the same inputs"):
        Profile.of_shapes({"x": (1,)}, {"x": (2,)}, {"y": (3,)})
