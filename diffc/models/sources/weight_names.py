"""Names of weight files as diffusers and transformers write them: their variants, indexes and shards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_WORD = r"[A-Za-z]\w*"
_SHARD = r"-\d{5}-of-\d{5}"
_INDEX = re.compile(
    rf"(?P<stem>\w+)(?:\.safetensors\.index(?:\.(?P<now>{_WORD}))?\.json"
    rf"|\.safetensors\.(?P<old>{_WORD})\.index\.json"
    rf"|\.(?P<odd>{_WORD})\.safetensors\.index\.json)"
)
_FILE = re.compile(rf"(?P<stem>\w+)(?:\.(?P<variant>{_WORD}))?\.safetensors")
_SHARD_FILE = re.compile(rf"\w+(?:\.(?P<now>{_WORD}))?{_SHARD}(?:\.(?P<old>{_WORD}))?\.safetensors")
_STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call the weights of a component."""


@dataclass(frozen=True)
class WeightFile:
    """The single file or the index that holds a component's weights.

    `variant` is the word that `save_pretrained(variant=...)` put into the name, None for plain weights. `spelling`
    tells an index apart: "now" (x.safetensors.index.fp16.json), "old" (x.safetensors.fp16.index.json), "odd"
    (x.fp16.safetensors.index.json, which diffusers does not read), and is empty for a single file.
    """

    name: str
    variant: str | None
    spelling: str = ""

    @property
    def is_index(self) -> bool:
        """Whether the file is an index of shards."""
        return bool(self.spelling)


def weight_files(names: Iterable[str]) -> list[WeightFile]:
    """The weights that `names`, the files of one folder, offer: plain before variants, an index before a file."""
    found = [file for name in sorted(names) if (file := _parsed(name)) is not None]

    def rank(file: WeightFile) -> tuple[bool, str, bool, bool]:
        return file.variant is not None, file.variant or "", file.name.startswith("model"), not file.is_index

    return sorted(found, key=rank)


def choose(names: Iterable[str], variant: str | None) -> WeightFile | None:
    """The weights to read, as diffusers chooses: those of `variant`, otherwise the plain ones, otherwise any."""
    files = weight_files(names)
    for wanted in (variant, None):
        for file in files:
            if file.variant == wanted:
                return file
    return next((file for file in files if file.variant == "fp16"), files[0] if files else None)


def common_variant(folders: Iterable[Iterable[str]]) -> str | None:
    """The variant under which every folder (its file names) has weights; None when plain ones are everywhere.

    Where no variant serves all of them, the first that some folder needs.
    """
    offered = [{file.variant for file in files} for names in folders if (files := weight_files(names))]
    words = {str(v) for variants in offered if None not in variants for v in variants}
    needed = sorted(words, key=lambda word: (word != "fp16", word))
    for variant in needed:
        if all(variants & {None, variant} for variants in offered):
            return variant
    return needed[0] if needed else None


def of_variant(names: Iterable[str], chosen: WeightFile) -> list[str]:
    """The file names that `chosen` consists of: itself, and the shards of its variant when it is an index."""
    if not chosen.is_index:
        return [chosen.name]
    shards = [
        n for n in names if (m := _SHARD_FILE.fullmatch(n)) and (m["now"] or m["old"]) == chosen.variant
    ]
    return [chosen.name, *shards]


def _parsed(name: str) -> WeightFile | None:
    if (match := _INDEX.fullmatch(name)) and match["stem"] in _STEMS:
        spelling = next((kind for kind in ("old", "odd") if match[kind]), "now")
        return WeightFile(name, match[spelling], spelling)
    if (match := _FILE.fullmatch(name)) and match["stem"] in _STEMS:
        return WeightFile(name, match["variant"])
    return None
