"""A file's adapters matched with the layers of a model; whatever does not fit is told, key by key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.lora.changes import Change, Decomposition, columns, rows_of
from passes.weights.lora.file import AdapterFile
from passes.weights.lora.keys import is_of_text_encoder, parse, refused_kind, without_prefix
from passes.weights.lora.kinds import KINDS, Factors, Kind, size_of
from passes.weights.lora.spellings import Layer, Piece, Shapes, Spellings, is_overriding
from passes.weights.lora.usable import why_unusable
from passes.weights.recipe import Recipe


@dataclass(frozen=True)
class Unmatched:
    """Keys of a file that change nothing, and the reason; `is_damaged`: they would fit no model."""

    keys: tuple[str, ...]
    reason: str
    is_damaged: bool = False

    def __str__(self) -> str:
        more = f" and {len(self.keys) - 1} more" if len(self.keys) > 1 else ""
        return f"{self.keys[0]}{more}: {self.reason}"


@dataclass(frozen=True)
class Matched:
    """What a file does to a model, and what of it does nothing.

    `layers`: how many layers of the file, by kind. `text_encoder`: keys that belong to text encoders.
    """

    changes: tuple[Change, ...]
    layers: Mapping[str, int]
    unmatched: tuple[Unmatched, ...]
    text_encoder: tuple[str, ...]
    unused_patterns: tuple[str, ...] = ()

    @property
    def fits_nothing(self) -> bool:
        """Whether no layer of the file can be applied."""
        return not self.changes and bool(self.unmatched)


@dataclass(frozen=True)
class Strength:
    """How strongly an adapter counts: `weight`, or for layers that a pattern matches, that of the last such pattern.

    A pattern (`*`, `?`, `[...]`) is held against the path of our module and against the file's own name of the layer.
    """

    weight: float = 1.0
    patterns: tuple[tuple[str, float], ...] = ()

    def of(self, *names: str) -> tuple[float, str | None]:
        """The weight of a layer with these names, and the pattern that gives it."""
        for pattern, weight in reversed(self.patterns):
            if any(fnmatchcase(name, pattern) for name in names):
                return weight, pattern
        return self.weight, None


@dataclass
class _Layers:
    """The tensors of a file by layer and role, and the key of each."""

    tensors: dict[str, dict[str, Recipe]] = field(default_factory=dict)
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    unmatched: list[Unmatched] = field(default_factory=list)
    text_encoder: list[str] = field(default_factory=list)

    def add(self, key: str, recipe: Recipe) -> None:
        """Sort one tensor of the file in."""
        if is_of_text_encoder(key):
            self.text_encoder.append(key)
        elif kind := refused_kind(key):
            self.unmatched.append(Unmatched((key,), f"it is of {kind}, which diffc cannot apply"))
        elif (parsed := parse(key)) is None:
            self.unmatched.append(Unmatched((key,), "its end is of no known kind of adapter"))
        elif parsed.role in self.tensors.get(parsed.layer, {}):
            first = self.keys[parsed.layer][parsed.role]
            self.unmatched.append(Unmatched((key,), f"{first} says the same"))
        else:
            self.tensors.setdefault(parsed.layer, {})[parsed.role] = recipe
            self.keys.setdefault(parsed.layer, {})[parsed.role] = key


def match(file: AdapterFile, shapes: Shapes, spellings: Spellings, strength: Strength) -> Matched:
    """What `file` does to a model whose parameters are `shapes`, with `spellings_of(shapes)`.

    Reads the scalars of the file and nothing else. A layer counts as a whole: when one of its pieces does not fit,
    none changes.
    """
    layers = _Layers()
    for key, recipe in file.tensors.items():
        layers.add(key, recipe)
    overrides = any(is_overriding(name) for name in layers.tensors)
    changes: list[Change] = []
    counted: Counter[str] = Counter()
    used: set[str | None] = set()
    seen: dict[tuple[str, str], str] = {}
    for name, tensors in layers.tensors.items():
        layer = _find(spellings, name, overrides)
        for part in _parts(name, tensors, layers.keys[name]):
            if isinstance(part, Unmatched):
                layers.unmatched.append(part)
                continue
            result = _apply(file, part, layer, shapes, strength, seen)
            if isinstance(result, Unmatched):
                layers.unmatched.append(result)
                continue
            changes += [change for change, _ in result if change.weight != 0]
            used |= {pattern for _, pattern in result}
            counted[part.kind.name] += 1
    unused = tuple(pattern for pattern, _ in strength.patterns if pattern not in used)
    return Matched(tuple(changes), dict(counted), tuple(layers.unmatched), tuple(layers.text_encoder), unused)


@dataclass(frozen=True)
class _Part:
    """The tensors of one kind of adapter for one layer."""

    name: str
    kind: Kind
    tensors: Mapping[str, Recipe]
    keys: tuple[str, ...]


def _find(spellings: Spellings, name: str, overrides: bool) -> Layer | None:
    found = (spellings.find(other, overrides=overrides) for other in without_prefix(name))
    return next((layer for layer in found if layer), None)


def _parts(name: str, tensors: Mapping[str, Recipe], keys: Mapping[str, str]) -> Iterator[_Part | Unmatched]:
    """The adapters of one layer, and what is left of its tensors."""
    left = dict.fromkeys(keys)
    for kind in KINDS:
        if kind.is_whole(tensors):
            roles = [role for role in keys if role in kind.roles]
            yield _Part(name, kind, tensors, tuple(keys[role] for role in roles))
            for role in roles:
                left.pop(role, None)
    if left:
        lacking = _lacking(left)
        reason = f"it is not complete{f': {lacking} is missing' if lacking else ''}"
        yield Unmatched(tuple(keys[role] for role in left), reason, is_damaged=True)


_COMMON = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)"}


def _lacking(left: Iterable[str]) -> str:
    there = set(left)
    for kind in KINDS:
        for needed in kind.needs:
            if there & needed and needed - there:
                return ", ".join(_COMMON.get(role, role) for role in sorted(needed - there))
    return ""


def _apply(
    file: AdapterFile,
    part: _Part,
    layer: Layer | None,
    shapes: Shapes,
    strength: Strength,
    seen: dict[tuple[str, str], str],
) -> list[tuple[Change, str | None]] | Unmatched:
    """The changes of one adapter of one layer, each with the pattern that gave its weight; or why there are none."""
    if layer is None:
        return Unmatched(part.keys, "the model has no such layer")
    targets = [_parameter(piece.module, part.kind.target) for piece in layer]
    if lacking := next((target for target in targets if target not in shapes), None):
        return Unmatched(part.keys, f"the model has no {lacking}")
    for target in targets:
        if (first := seen.setdefault((target, part.kind.target), part.name)) != part.name:
            return Unmatched(part.keys, f"{first} changes {target} already")
    if reason := why_unusable({role: t for role, t in part.tensors.items() if role in part.kind.roles}):
        return Unmatched(part.keys, reason, is_damaged=True)
    try:
        made = part.kind.make(part.tensors)
    except (PassError, IndexError) as error:
        return Unmatched(part.keys, f"its tensors do not fit each other ({error})", is_damaged=True)
    wanted = _size(layer, [shapes[target] for target in targets])
    if size_of(made) != wanted and not _same_vector(made, wanted):
        text = f"it is made for {_spell(size_of(made))}, and {targets[0]} has {_spell(wanted)}: another base"
        return Unmatched(part.keys, text)
    decomposed = _decomposition(part, wanted, len(layer))
    if isinstance(decomposed, str):
        return Unmatched(part.keys, decomposed)
    scale = _scale(file, part)
    result = []
    for piece, target in zip(layer, targets, strict=True):
        weight, pattern = strength.of(piece.module, part.name)
        result.append((_change(part, piece, target, made, scale, weight, decomposed), pattern))
    return result


def _parameter(module: str, target: str) -> str:
    return f"{module}.{target}" if module else target


def _size(layer: Layer, shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Rows and columns that the file's layer must have."""
    rows = sum(
        shape[0] if piece.count is None else piece.count for piece, shape in zip(layer, shapes, strict=True)
    )
    return rows, columns(shapes[0])


def _same_vector(made: Factors | Recipe, wanted: tuple[int, int]) -> bool:
    """Whether a dense difference has the same elements in another shape, such as a table [1, 6, N] for [6, N]."""
    if isinstance(made, Factors):
        return False
    rows, width = size_of(made)
    return rows * width == wanted[0] * wanted[1] and (1 in (rows, *made.shape[:1]) or width == 1)


def _spell(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _decomposition(part: _Part, size: tuple[int, int], pieces: int) -> Decomposition | str | None:
    """DoRA's norms: of rows as PEFT has them; in LyCORIS of rows where there is one for each, otherwise of columns."""
    role = next(
        (r for r in ("magnitude", "row_magnitude") if r in part.kind.roles and r in part.tensors), None
    )
    if role is None:
        return None
    magnitude = part.tensors[role]
    shape = [n for n in magnitude.shape if n != 1] or [1]
    by_row = role == "row_magnitude" or magnitude.shape[0] == size[0]
    if len(shape) != 1 or (by_row and shape[0] not in (size[0], 1)):
        return f"its magnitude has shape {list(magnitude.shape)}"
    if by_row:
        return Decomposition(magnitude.reshape((shape[0],)), 0)
    if pieces > 1:
        return "its norms are of columns, through layers that the model has apart"
    return Decomposition(magnitude.reshape((shape[0],)), 1)


def _scale(file: AdapterFile, part: _Part) -> float:
    kind, tensors = part.kind, part.tensors
    ranked = next((tensors[role] for role in kind.ranked if role in tensors), None)
    if "up_bias" in tensors and kind.target == "bias" and "down" in tensors:
        ranked = tensors["down"]
    if ranked is None:
        return 1.0
    alpha = tensors.get("alpha")
    value = None if alpha is None else float(evaluate(alpha).reshape(-1)[0])
    return file.scale(part.name, value, ranked.shape[0])


def _change(
    part: _Part,
    piece: Piece,
    target: str,
    made: Factors | Recipe,
    scale: float,
    weight: float,
    decomposed: Decomposition | None,
) -> Change:
    if decomposed is not None and decomposed.axis == 0:
        decomposed = Decomposition(rows_of(decomposed.magnitude, piece), 0)
    if isinstance(made, Factors):
        left = rows_of(made.left, piece)
        return Change(target, part.kind.name, scale, weight, left, made.right, decomposition=decomposed)
    if piece.count is not None or piece.swapped:
        made = rows_of(made, piece)
    if part.kind.name == "whole tensor":
        return Change(target, part.kind.name, scale, weight, whole=made)
    return Change(target, part.kind.name, scale, weight, dense=made, decomposition=decomposed)
