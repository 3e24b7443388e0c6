"""A file that is quantized already: which of its codes are kept, and whether the GPUs that are asked for have them."""

from __future__ import annotations

from collections.abc import Sequence

from diffc.backends.sm import check_format_sms
from diffc.backends.target import Target
from diffc.errors import UsageError
from diffc.models.sources.source import ModelSource
from diffc.quantize.formats import FORMATS, STORED, Format, find_format

AUTO = "auto"
"""The format of a compile that names none: "stored" for a file that is quantized, "none" for any other."""
FORMAT_OF = {"fp8": "fp8", "int8": "int8", "int4": "int4_awq", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}
"""Kind of code -> the format that has it, which says where it runs."""


def format_of(name: str, source: ModelSource) -> Format:
    """The format that `name` means for this model. Raises UsageError for "stored" where nothing is quantized."""
    if name == AUTO:
        return STORED if source.held else FORMATS["none"]
    if name == STORED.name and not source.held:
        raise UsageError(
            f"{source.path} holds no quantized layer, so there is nothing stored to keep",
            fix="choose a format with --format, or leave it out",
        )
    return find_format(name)


def check_held(source: ModelSource, targets: Sequence[Target], sms: Sequence[int]) -> None:
    """Raise UnsupportedError when a target or a GPU lacks a kind of code that the file holds."""
    for kind in sorted(kinds_of(source)):
        fmt = FORMATS[FORMAT_OF[kind]]
        check_format_sms(fmt.name, fmt.min_sm, sms)
        for target in targets:
            target.check_format(fmt.name)


def kinds_of(source: ModelSource) -> set[str]:
    """The kinds of codes that weights and inputs of the file have."""
    inputs = {layer.input.kind for layer in source.held.values() if layer.input is not None}
    return {layer.kind for layer in source.held.values()} | inputs


def described(source: ModelSource) -> str:
    """The layers held, in words: "112 fp8, 3 nvfp4"."""
    kinds = [layer.kind for layer in source.held.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
