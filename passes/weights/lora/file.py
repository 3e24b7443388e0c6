"""An adapter file: its tensors as recipes, and what PEFT's settings beside them say about scales."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from passes.base import PassError
from passes.files.bounded import parse_object, read_text, regular
from passes.files.contained import why_outside
from passes.weights.recipe import Recipe
from passes.weights.sources import safetensors_metadata, safetensors_tensors

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_AGAIN = "Fix: save the LoRA again"
_REPEATED, _REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"\)\s*[*+{]")
"""A repeated group that holds a repetition takes time that doubles with every letter of a name."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file: `tensors` by key; `settings` are PEFT's LoraConfig by the prefix of the layers it is for."""

    path: Path
    tensors: Mapping[str, Recipe]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def scale(self, layer: str, alpha: float | None, rank: int) -> float:
        """What the product of the factors is multiplied with: alpha / rank, 1 where nothing gives an alpha.

        An alpha in the file comes before PEFT's settings, whose patterns name single layers. With `use_rslora` the
        square root of the rank divides (arXiv:2312.03732).
        """
        settings, name = self._settings_of(layer)
        if alpha is None and "lora_alpha" in settings:
            alpha = _by_pattern(settings.get("alpha_pattern"), name, settings["lora_alpha"])
        if alpha is None or rank == 0:
            return 1.0
        if not isinstance(alpha, int | float) or not isfinite(alpha):
            raise PassError(
                f"{self.path}: the alpha of {layer} is {str(alpha)[:40]!r}, not a number. {_AGAIN}"
            )
        return float(alpha) / (sqrt(rank) if settings.get("use_rslora") else rank)

    def _settings_of(self, layer: str) -> tuple[Mapping[str, Any], str]:
        """The settings for a layer, and its name without the prefix that they are for."""
        for prefix, settings in self.settings.items():
            if layer.startswith(prefix):
                return settings, layer.removeprefix(prefix).removeprefix("base_model.model.")
        return {}, layer


def _by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the layer's name, from a dot on."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if _compiled(pattern).fullmatch(name):
            return value
    return default


@lru_cache(1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    """The rule for a pattern. Raises PassError for one that is none, or that could take for ever to match."""
    if len(pattern) > 512 or _REPEATED_GROUP.search(pattern) or len(_REPEATED.findall(pattern)) > 4:
        raise PassError(
            f"the pattern {pattern[:80]!r} of a LoRA's settings repeats too much. Fix: name the layers"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        raise PassError(f"the pattern {pattern[:80]!r} of a LoRA's settings: {error}. {_AGAIN}") from error


def read_adapter(path: Path) -> AdapterFile:
    """The adapter in a safetensors file, or in a folder that PEFT or diffusers wrote; no tensor is read.

    Raises PassError when there is none, when it is a pickle, and when the header is damaged.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.exists():
        raise PassError(f"there is no LoRA file {path}. Fix: check the path")
    regular(path)
    if path.suffix.lower() in _PICKLES:
        raise PassError(
            f"{path} is a pickle, which can run code. Fix: give a .safetensors file, or convert it where you trust it"
        )
    try:
        tensors = safetensors_tensors(path)
    except PassError as error:
        raise PassError(f"{error}. Fix: download it again, or give another file") from error
    if not tensors:
        raise PassError(f"{path} holds no tensors. Fix: download it again")
    return AdapterFile(path, tensors, _settings(path))


def _in_folder(folder: Path) -> Path:
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if not files:
        raise PassError(f"the folder {folder} has no .safetensors file. Fix: name the LoRA file itself")
    names = ", ".join(file.name for file in files[:8])
    raise PassError(f"the folder {folder} has several .safetensors files: {names}. Fix: name one of them")


def _settings(path: Path) -> dict[str, Mapping[str, Any]]:
    """PEFT's settings from the file's header (diffusers puts them there), else from adapter_config.json beside it."""
    text = safetensors_metadata(path).get("lora_adapter_metadata")
    if text is not None:
        return _by_prefix(_json(text, path))
    beside = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_FILE and beside.is_file() and not why_outside(path.parent, PEFT_CONFIG):
        return {"": _json(read_text(beside), beside)}
    return {}


def _by_prefix(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{"unet.r": 4, "unet.lora_alpha": 8} -> {"unet.": {"r": 4, "lora_alpha": 8}}; longer prefixes first."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        prefix, dot, name = key.rpartition(".")
        found.setdefault(prefix + dot, {})[name] = value
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _json(text: str, where: Path) -> dict[str, Any]:
    try:
        return parse_object(text, f"the text of PEFT's settings in {where}")
    except PassError as error:
        raise PassError(f"{error}. {_AGAIN}") from error
