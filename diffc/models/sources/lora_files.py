"""The LoRA files that --lora names: the option's text, and where the file lies, on disk or on the Hugging Face hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError, UsageError
from diffc.models.embedded.loras import EMBEDDED_LORAS
from diffc.models.sources.hub_cache import repository_folder, snapshot
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.paths import is_there
from passes.weights.lora.file import DIFFUSERS_FILE
from passes.weights.lora.match import Strength

_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>[\w./ -]+\.safetensors))?")
_FORM = "write FILE, FILE=WEIGHT, or FILE=WEIGHT,PATTERN=WEIGHT,..., such as style.safetensors=0.8,*attn*=0.5"


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA to apply: a file, a folder, an id of the hub or the name of an embedded one, and how strongly it counts.

    `patterns` are (pattern, weight): layers that a pattern matches have its weight in the place of `weight`, those of
    several the last one's. See `passes.weights.lora.match.Strength`.
    """

    file: str
    weight: float = 1.0
    patterns: tuple[tuple[str, float], ...] = ()

    @property
    def strength(self) -> Strength:
        """How strongly it counts, for `passes`."""
        return Strength(self.weight, self.patterns)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LoraSpec:
        """The spec that a manifest holds."""
        patterns = tuple((str(pattern), float(weight)) for pattern, weight in values.get("patterns", ()))
        return cls(str(values["file"]), float(values["weight"]), patterns)


def parse_lora(text: str) -> LoraSpec:
    """The spec of `FILE[=WEIGHT[,PATTERN=WEIGHT...]]`; a path that exists may have an equals sign in it.

    Raises UsageError that says what is wrong.
    """
    file, settings = _split(text)
    if not file:
        raise UsageError(f"--lora {text!r} names no file", fix=_FORM)
    first, *others = settings.split(",") if settings is not None else ("1",)
    if "=" in first:
        first, others = "1", [first, *others]
    pairs = [item.rpartition("=") for item in others]
    if wrong := next(
        (item for item, (name, _, _) in zip(others, pairs, strict=True) if not name.strip()), None
    ):
        raise UsageError(f"--lora {text!r}: {wrong!r} is not PATTERN=WEIGHT", fix=_FORM)
    patterns = tuple((name.strip(), _number(value, text)) for name, _, value in pairs)
    return LoraSpec(file, _number(first, text), patterns)


def _split(text: str) -> tuple[str, str | None]:
    """The file, and what follows the equals sign after it; None without one."""
    places = [i for i, char in enumerate(text) if char == "="]
    for end in (len(text), *reversed(places)):
        if text[:end] and is_there(text[:end]):
            return text[:end], text[end + 1 :] if end < len(text) else None
    file, equals, settings = text.partition("=")
    return file, settings if equals else None


def _number(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"--lora {option!r}: {text!r} is not a weight", fix=_FORM)
    return value


def lora_path(spec: LoraSpec, hub: HubOptions = DEFAULT_HUB) -> Path:
    """The file of `spec`; one of the hub is taken from its cache or downloaded. `hub` gives token and cache.

    Raises DiffcError when it is nowhere.
    """
    path = Path(spec.file).expanduser()
    if path.exists():
        return path.absolute()
    if spec.file in EMBEDDED_LORAS:
        return EMBEDDED_LORAS[spec.file]
    match = _ID.fullmatch(spec.file)
    if match is None or (match["file"] is None and path.suffix == ".safetensors"):
        fix = (
            "check the path; a LoRA of the Hugging Face hub is OWNER/NAME or OWNER/NAME/FILE.safetensors, "
            f"and diffc has {' and '.join(EMBEDDED_LORAS)}"
        )
        raise DiffcError(f"there is no LoRA file {path}", fix=fix)
    return _of_hub(match["name"], match["file"], hub)


def _of_hub(name: str, file: str | None, hub: HubOptions) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download

    cache = (hub.cache_dir or Path(constants.HF_HUB_CACHE)).expanduser().absolute()
    cached = snapshot(repository_folder(cache, name), None)
    if constants.HF_HUB_OFFLINE:
        return _cached(name, file, cached, "the hub is not asked, since HF_HUB_OFFLINE is set")
    try:
        if file is None:
            file = _only(name, HfApi(token=hub.token).list_repo_files(name))
        return Path(hf_hub_download(name, file, cache_dir=cache, token=hub.token))
    except DiffcError:
        raise
    except Exception as error:  # every kind of network and hub error: the cache answers instead
        return _cached(name, file, cached, f"the hub answers: {type(error).__name__}")


def _cached(name: str, file: str | None, folder: Path | None, reason: str) -> Path:
    """The file in the cache's snapshot `folder`."""
    if folder is not None and file is None:
        file = _only(name, [path.name for path in folder.glob("*.safetensors")])
    if folder is None or file is None or not (folder / file).is_file():
        fix = "check the id; gated models need --token; without a network, give the file of a download"
        raise DiffcError(
            f"the LoRA {name} is not a file here and not in the hub's cache, and {reason}", fix=fix
        )
    return folder / file


def _only(name: str, files: Sequence[str]) -> str:
    """The one adapter of a repository. Raises DiffcError that lists its files."""
    found = sorted(file for file in files if file.endswith(".safetensors"))
    if DIFFUSERS_FILE in found or len(found) == 1:
        return DIFFUSERS_FILE if DIFFUSERS_FILE in found else found[0]
    listed = ", ".join(found[:8]) or "none"
    raise DiffcError(
        f"{name} has several LoRA files, or none: {listed}", fix=f"name the file: {name}/FILE.safetensors"
    )
