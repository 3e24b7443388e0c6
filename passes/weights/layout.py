"""Where each tensor lies in the file of weights, known before any is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx

from passes.weights.initializers import INLINE_BYTES, initializers, inline
from passes.weights.journal import code_version, fingerprint
from passes.weights.recipe import Recipe

_PAGE, _LINE = 4096, 64  # alignment of large and small tensors: mappable pages, cache lines


@dataclass(frozen=True)
class Place:
    """Where a recipe's result lies in the file of weights; `name` is the first tensor's that has it.

    `inside`: another place holds it, as some of its rows.
    """

    name: str
    recipe: Recipe
    offset: int
    inside: bool = False

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.recipe.nbytes


def _key(recipe: Recipe) -> str:
    return json.dumps(recipe.to_json(), sort_keys=True)


def lay_out(models: Iterable[onnx.ModelProto]) -> dict[str, Place]:
    """The place of every distinct recipe that goes to the file of weights, in its order there.

    What is joined in one model and single in another is stored joined, where that leaves the single one aligned.
    """
    recipes: dict[str, tuple[str, Recipe]] = {}
    for tensor in (tensor for model in models for tensor in initializers(model)):
        recipe = Recipe.of_tensor(tensor)
        if recipe is not None and recipe.nbytes > INLINE_BYTES:
            recipes.setdefault(_key(recipe), (tensor.name, recipe))
    inside = {part: found for key, (_, recipe) in recipes.items() for part, found in _parts(key, recipe)}
    inside = {part: found for part, found in inside.items() if part in recipes and found[0] not in inside}
    places: dict[str, Place] = {}
    end = 0
    for key, (name, recipe) in recipes.items():
        if key not in inside:
            places[key] = Place(name, recipe, end + -end % _alignment(recipe))
            end = places[key].end
    for key, (whole, distance) in inside.items():
        places[key] = Place(*recipes[key], places[whole].offset + distance, inside=True)
    return places


def _alignment(recipe: Recipe) -> int:
    return _PAGE if recipe.nbytes >= 1 << 16 else _LINE


def _parts(key: str, recipe: Recipe) -> Iterator[tuple[str, tuple[str, int]]]:
    """The keys of recipes that are rows of this one, and their distance from its start."""
    distance, rows = 0, recipe.rows
    for part in rows if len(rows) > 1 else ():
        if distance % _alignment(part) == 0 and _alignment(recipe) >= _alignment(part):
            yield _key(part), (key, distance)
        distance += part.nbytes


def total_size(places: Mapping[str, Place]) -> int:
    """Bytes of the file."""
    return max((place.end for place in places.values()), default=0)


def identity_of(places: Mapping[str, Place]) -> str:
    """A hash of all that the bytes depend on: recipes, the files that they read, and this code."""
    paths = {path for place in places.values() for path in _paths(place.recipe.to_json())}
    content = [code_version(), [fingerprint(path) for path in sorted(paths)]]
    return hashlib.sha256(json.dumps([*content, *places]).encode()).hexdigest()


def _paths(value: object) -> Iterator[str]:
    """Every file that a recipe, as JSON values, reads, its arguments' files included."""
    if isinstance(value, dict):
        if value.get("path"):
            yield value["path"]
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths(item)


def resolve(model: onnx.ModelProto, places: Mapping[str, Place], location: str) -> None:
    """Give every recipe of `model` its values, or the place in the file `location` where they are."""
    for tensor in initializers(model):
        recipe = Recipe.of_tensor(tensor)
        if recipe is None:
            continue
        place = places.get(_key(recipe))
        if place is None:
            tensor.CopyFrom(inline(tensor.name, recipe))
            continue
        del tensor.external_data[:]
        entries = {"location": location, "offset": place.offset, "length": recipe.nbytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
