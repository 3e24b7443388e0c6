"""Places in the file of weights: none over another, aligned, one for equal recipes, and what the models say of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from passes.weights.evaluate import evaluate, to_bytes
from passes.weights.initializers import INLINE_BYTES
from passes.weights.layout import identity_of, lay_out, resolve, total_size
from passes.weights.recipe import Recipe, Source
from tests.passes.graph_helpers import model, pick

LARGE = 1 << 16
"""Bytes from which on a tensor begins on a page."""


def random(rng: np.random.Generator, *shape: int) -> Recipe:
    return Recipe.of_array(rng.standard_normal(shape).astype(np.float32))


def holding(**recipes: Recipe) -> onnx.ModelProto:
    return model("g (float[1] x) => (float[1] y) { y = Neg(x) }", recipes)


@pytest.mark.parametrize("seed", range(10))
def test_places_are_aligned_and_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    recipes = {f"w{i}": random(rng, int(rng.integers(1, pick(rng, 300, 3000, 20000)))) for i in range(12)}
    recipes["again"] = recipes["w0"]
    places = list(lay_out([holding(**recipes)]).values())
    large = {name: recipe for name, recipe in recipes.items() if recipe.nbytes > INLINE_BYTES}
    assert {place.name for place in places} == set(large) - {"again"}
    end = 0
    for place in places:
        assert place.offset % (4096 if place.recipe.nbytes >= LARGE else 64) == 0
        assert 0 <= place.offset - end < 4096  # in order, and no gap beyond what alignment asks for
        end = place.end
    assert total_size(lay_out([holding(**recipes)])) == end
    assert total_size({}) == 0


@pytest.mark.parametrize("rows", [(16, 32, 48), (17, 32, 3)])
def test_joined_rows_hold_the_single_ones_where_these_are_aligned(rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    parts = [random(rng, count, 20) for count in rows]
    joined = parts[0].append(parts[1:])
    models = [holding(a=parts[0], b=parts[1], c=parts[2]), holding(joined=joined)]
    places = {place.name: place for place in lay_out(models).values()}
    whole, content = places["joined"], bytes(to_bytes(evaluate(joined)))
    assert not whole.inside
    distance = 0
    for name, part in zip("abc", parts, strict=True):
        place = places.get(name)
        if place is not None and place.inside:
            assert place.offset - whole.offset == distance
            held = content[place.offset - whole.offset : place.end - whole.offset]
            assert held == bytes(to_bytes(evaluate(part)))
        assert part.nbytes <= INLINE_BYTES or place is not None
        if place is not None:
            assert place.inside == (distance % 64 == 0)
            assert place.offset % 64 == 0
        distance += part.nbytes
    outside = sorted((p.offset, p.end) for p in places.values() if not p.inside)
    assert all(before[1] <= after[0] for before, after in pairwise(outside))


def test_models_say_where_their_weights_are() -> None:
    rng = np.random.default_rng(4)
    small, large = random(rng, 4), random(rng, 30, 40)
    made = holding(small=small, large=large, twin=large)
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "held"))
    places = lay_out([made])
    resolve(made, places, "model.onnx_data")
    held = {tensor.name: tensor for tensor in made.graph.initializer}
    assert np.array_equal(onnx.numpy_helper.to_array(held["small"]), evaluate(small))
    assert held["held"].raw_data
    entries = [{e.key: e.value for e in held[name].external_data} for name in ("large", "twin")]
    (place,) = places.values()
    expected = {"location": "model.onnx_data", "offset": str(place.offset), "length": str(30 * 40 * 4)}
    assert entries == [expected, expected]


def test_the_identity_follows_recipes_places_and_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        path.write_bytes(bytes(range(256)) * 16)
    plain, scale = (Recipe.of_source(Source("raw", str(path), 1, (32, 32), length=4096)) for path in paths)
    scaled = plain.multiply(scale)  # the second file is one of an argument

    def identity(*recipes: Recipe) -> str:
        return identity_of(lay_out([holding(**{f"w{i}": recipe for i, recipe in enumerate(recipes)})]))

    first = identity(scaled)
    assert identity(scaled) == first
    assert len({first, identity(plain), identity(scaled, plain), identity(plain, scaled)}) == 4
    paths[1].write_bytes(bytes(8192))
    assert identity(scaled) != first
