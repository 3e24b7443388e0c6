"""Adapter files fused into the weights of a model, as recipes; and the error for what does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from passes.base import PassError
from passes.weights.lora.changes import Change, fused
from passes.weights.lora.file import AdapterFile, read_adapter
from passes.weights.lora.match import Matched, Strength, match
from passes.weights.lora.spellings import Shapes, spellings_of
from passes.weights.lora.usable import check_values
from passes.weights.recipe import Recipe

_LISTED = 12
"""Keys that a message lists."""


@dataclass(frozen=True)
class Applied:
    """An adapter file, and what of it fits the model."""

    file: AdapterFile
    strength: Strength
    matched: Matched

    def summary(self) -> str:
        """One line for a person: what was applied, how strongly, and what was not."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.matched.layers.items()) or "nothing"
        weight = f"{self.strength.weight:g}{', by pattern' if self.strength.patterns else ''}"
        text = f"{self.file.path.name} (weight {weight}): {kinds} layers"
        if self.matched.text_encoder:
            text += f"; {len(self.matched.text_encoder)} keys are of text encoders, not of the backbone"
        if self.matched.unmatched:
            keys = sum(len(item.keys) for item in self.matched.unmatched)
            text += f"; {keys} keys are left out, as --lora-partial allows"
        return text


def apply_files(
    files: Sequence[tuple[Path, Strength]], shapes: Shapes, *, partial: bool = False
) -> list[Applied]:
    """Match adapter files with a model whose parameters have `shapes`.

    Raises PassError for a file that cannot be read, one that fits nothing, a pattern that matches no layer, and,
    unless `partial`, for keys that fit nothing; they are listed.
    """
    spellings = spellings_of(shapes)
    applied = []
    for path, strength in files:
        file = read_adapter(path)
        matched = match(file, shapes, spellings, strength)
        _check(file, matched, partial)
        check_values(file)
        applied.append(Applied(file, strength, matched))
    return applied


def changes_by_parameter(applied: Sequence[Applied]) -> dict[str, list[Change]]:
    """Every change of every file, by the parameter that it is of."""
    found: dict[str, list[Change]] = {}
    for item in applied:
        for change in item.matched.changes:
            found.setdefault(change.parameter, []).append(change)
    return found


def fuse(weights: Mapping[str, Recipe], applied: Sequence[Applied]) -> dict[str, Recipe]:
    """The weights with all adapters in them: float32 where one changes them, as they are elsewhere."""
    changes = changes_by_parameter(applied)
    return {
        name: fused(recipe, changes[name]) if name in changes else recipe for name, recipe in weights.items()
    }


def _check(file: AdapterFile, matched: Matched, partial: bool) -> None:
    if matched.fits_nothing:
        raise PassError(_fits_nothing(file, matched))
    if not matched.layers:
        what = "only has keys of text encoders" if matched.text_encoder else "changes nothing"
        raise PassError(f"{file.path.name} {what}. Fix: leave it out of the compile")
    if set(matched.layers) == {"whole tensor"}:
        raise PassError(
            f"{file.path.name} holds whole weights and no difference to any: it is a model, not a LoRA. Fix: give it as"
            " the model to compile"
        )
    if matched.unused_patterns:
        raise PassError(
            f"the pattern {matched.unused_patterns[0]!r} matches no layer of {file.path.name}. Fix: patterns are held"
            " against module paths such as transformer_blocks.0.attn.to_q, and against the file's own names"
        )
    if matched.unmatched and not partial:
        count = sum(len(item.keys) for item in matched.unmatched)
        base = made_for(file)
        looks = f" (by its names it is for {base})" if base else ""
        raise PassError(
            f"{count} of {len(file.tensors)} keys of {file.path.name}{looks} do not fit the model:{_listed(matched)}\n"
            "Fix: give the LoRA of this model, or --lora-partial to leave them out"
        )


def _fits_nothing(file: AdapterFile, matched: Matched) -> str:
    if all(item.is_damaged for item in matched.unmatched):
        return (
            f"nothing of {file.path.name} can be applied:{_listed(matched, 4)}\n"
            "Fix: download it again, or save it again with the tool that trained it"
        )
    base = made_for(file)
    return (
        f"{file.path.name} was made for another model{f' ({base})' if base else ''}: none of its layers fit:"
        f"{_listed(matched, 4)}\nFix: give a LoRA of this model"
    )


def _listed(matched: Matched, most: int = _LISTED) -> str:
    lines = [f"\n  {item}" for item in matched.unmatched[:most]]
    if (more := len(matched.unmatched) - most) > 0:
        lines.append(f"\n  and {more} more")
    return "".join(lines)


_BASES: tuple[tuple[str, int | None, str], ...] = (
    (r"attn2[._]to_k\b.*|attn2_to_k", 768, "Stable Diffusion 1.x"),
    (r"attn2[._]to_k\b.*|attn2_to_k", 1024, "Stable Diffusion 2.x"),
    (r"attn2[._]to_k\b.*|attn2_to_k", 2048, "SDXL"),
    (r"(down|up|input|output)_blocks[._]\d+[._].*(attn1|resnets|proj_in)", None, "a UNet, such as SDXL"),
    (r"joint_blocks[._]", None, "Stable Diffusion 3"),
    (r"(double|single)_blocks[._]|single_transformer_blocks[._]", None, "FLUX, or a model built like it"),
    (r"blocks[._]\d+[._](self|cross)_attn[._]", None, "Wan"),
    (r"layers[._]\d+[._]attention[._]", None, "Z-Image or Lumina"),
)
"""(what a key has in it, columns of its down factor or None, the model)."""


def made_for(file: AdapterFile) -> str:
    """The model that a file was made for, as far as its names and shapes tell; empty when they do not."""
    for pattern, width, name in _BASES:
        for key, recipe in file.tensors.items():
            down = re.search(r"down|lora_A", key) is not None
            if re.search(pattern, key) and (width is None or (down and recipe.shape[-1] == width)):
                return name
    return ""
