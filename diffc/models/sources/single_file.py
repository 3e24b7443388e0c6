"""Reads a backbone in one file: names of the original release or of diffusers, plain or quantized, with or without
text encoders and VAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from diffc.models.registry import family_of
from diffc.models.single.convert import Converted, config_of, convert
from diffc.models.single.files import SUFFIXES, File, read_file, statement_of
from diffc.models.single.layouts import Layout, known_layouts, layout_of
from diffc.models.single.parts import Parts, split_parts, unknown_file
from diffc.models.sources.source import ModelSource, Reader
from diffc.models.stored.decode import Statement, decode
from diffc.models.stored.held import Decoded, Held, compute_dtype
from passes.weights.recipe import Recipe, bits_of


def _declines(model: str) -> str | None:
    path = Path(model).expanduser()
    if path.suffix not in SUFFIXES:
        return f"{model!r} does not end in {', '.join(SUFFIXES)}"
    return None if path.is_file() else f"there is no file {path}"


def _open(model: str) -> ModelSource:
    return read_single_file(Path(model).expanduser().absolute())


def read_single_file(path: Path) -> ModelSource:
    """The backbone in a file.

    Raises UnsupportedError for one of no known kind, DiffcError for one that is not whole.
    """
    file = read_file(path)
    parts, layout, decoded = look_into(file)
    found = convert(layout, decoded.weights, path)
    config = config_of(layout, found.weights, path)
    family = family_of(config, f"{path} ({layout.title})")
    held = held_layers(layout, decoded, found, path)
    # What is quantized in any way is computed in the type of the rest; a plain file keeps its own.
    quantized = held or file.quantized or any(bits_of(r.dtype) < 16 for r in file.tensors.values())
    dtype = compute_dtype(decoded.weights, _quantized(file, parts, decoded)) if quantized else ""
    name = path.stem
    return ModelSource(
        name,
        path,
        None,
        config,
        family,
        found.weights,
        stored_dtype=dtype,
        held=held,
        parts=parts.others,
        beside=parts.beside,
    )


def look_into(file: File) -> tuple[Parts, Layout, Decoded]:
    """The parts of a file, the kind of its backbone, and its weights with scales taken in."""
    parts = split_parts(file.tensors, file.path)
    layout = layout_of(parts.backbone)
    if layout is None:
        told = file.metadata.get("general.architecture", "")  # GGUF's own word for the model
        raise unknown_file(file.tensors, file.path, known_layouts(), told)
    said = statement_of(file.metadata)
    layers = {name.removeprefix(parts.prefix): told for name, told in said.layers.items()}
    said = Statement(said.algorithm, layers, said.comfyui)
    decoded = decode(parts.backbone, said, file.path)
    blocks = {name.removeprefix(parts.prefix): kind for name, kind in file.quantized.items()}
    four = {
        name: decoded.weights[name]
        for name, kind in blocks.items()
        if kind == "Q4_0" and name in decoded.weights
    }
    held = {
        name.removesuffix(".weight"): Held("int4", recipe)
        for name, recipe in four.items()
        if _is_matrix(name, recipe)
    }
    return parts, layout, Decoded(decoded.weights, {**decoded.held, **held})


def _is_matrix(name: str, recipe: Recipe) -> bool:
    return name.endswith(".weight") and len(recipe.shape) == 2


def _quantized(file: File, parts: Parts, decoded: Decoded) -> Mapping[str, Held]:
    """Layers whose type says nothing about the type to compute in."""
    names = {name.removeprefix(parts.prefix).removesuffix(".weight") for name in file.quantized}
    any_held = next(iter(decoded.held.values()), None)
    blocks = {name: any_held for name in names if any_held is not None}
    return {**blocks, **decoded.held}


def held_layers(layout: Layout, decoded: Decoded, found: Converted, where: object) -> dict[str, Held]:
    """The layers held, by diffusers' names: rows of a joined layer are layers of their own, with its input."""
    if not decoded.held:
        return {}
    stored = {name: _as_held(name, recipe, decoded) for name, recipe in decoded.weights.items()}
    moved = convert(layout, stored, where).weights
    result = {}
    for name, keys in found.origins.items():
        layers = [decoded.held.get(key.removesuffix(".weight")) for key in keys]
        if name.endswith(".weight") and len(layers) == 1 and layers[0] is not None:
            held = layers[0]
            if held.low_rank is not None and moved[name].shape != held.weight.shape:
                continue  # its branch would have to be cut as well
            result[name.removesuffix(".weight")] = replace(held, weight=moved[name])
    return result


def _as_held(name: str, recipe: Recipe, decoded: Decoded) -> Recipe:
    held = decoded.held.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    return recipe if held is None else held.weight


READER = Reader("single file", "a model in one file (.safetensors, .gguf, .ckpt)", _declines, _open)
