"""The embedded models: small pipelines that diffc makes itself, known by name, without a download.

Their data is here and needs no torch; `tiny.py` and `digits.py` build them on the first use.
A finished folder holds a manifest of its files, written last and renamed into place with the rest: a folder
either is complete or does not exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffc.errors import DiffcError, unknown
from diffc.models.embedded import digits, digits_video, tiny
from diffc.output_folders import filled, one_writer

MANIFEST = "diffc-embedded.json"


@dataclass(frozen=True)
class EmbeddedModel:
    """One embedded model: `component` is its backbone's folder, `dtype` the type of the stored weights.

    `native` is the size that it was trained for (height, width, frames) where its configurations cannot tell.
    """

    name: str
    family: str
    component: str
    dtype: str
    description: str
    native: Mapping[str, int] = field(default_factory=dict)


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel("tiny-sd3", "sd3", "transformer", "float16", "SD3-medium style: three joint blocks"),
        EmbeddedModel(
            "tiny-sd35", "sd3", "transformer", "float16", "SD3.5-medium style: dual attention, RMS norm"
        ),
        EmbeddedModel(
            "tiny-flux",
            "flux",
            "transformer",
            "bfloat16",
            "FLUX.1-dev style: three double, three single blocks",
        ),
        EmbeddedModel(
            "tiny-sdxl", "sdxl", "unet", "float16", "SDXL style: UNet of three levels, text and time ids"
        ),
        EmbeddedModel(
            "digits-sd3", "sd3", "transformer", "float16", "trained: paints digits, SD3-medium style, 64 px"
        ),
        EmbeddedModel(
            "digits-flux",
            "flux",
            "transformer",
            "bfloat16",
            "trained: paints digits, FLUX.1-dev style, 64 px",
        ),
        EmbeddedModel("digits-sdxl", "sdxl", "unet", "float16", "trained: paints digits, SDXL style, 64 px"),
        EmbeddedModel("digits-sd15", "sd", "unet", "float16", "trained: paints digits, SD1.5 style, 64 px"),
        EmbeddedModel(
            "digits-video",
            "ltx",
            "transformer",
            "float16",
            "trained: paints digits that move, LTX-Video style, 9 frames of 32 px",
            digits_video.NATIVE,
        ),
    )
}


_MAKING = 600.0
"""Seconds for which a process waits for another that makes the same model: half a minute on a slow core."""


def make(name: str, directory: Path) -> Path:
    """Write the pipeline folder of an embedded model to `directory` and return it.

    A folder that already holds exactly this model is left as it is. Raises DiffcError for an unknown name and
    for a directory that holds something else.
    """
    if name not in EMBEDDED:
        raise unknown("embedded model", name, EMBEDDED)
    if _holds(directory, name):
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DiffcError(
            f"{directory} exists and is not {name} as this diffc makes it", fix="remove it or name another"
        )
    try:
        with one_writer(directory, wait=_MAKING) as partial:
            if not _holds(directory, name):  # else another process was first
                with filled(partial, directory):
                    _write(name, partial)
    except (OSError, SafetensorError) as error:
        fix = "free space, or give a place that can be written (DIFFC_CACHE sets the cache)"
        raise DiffcError(f"cannot write {name} to {directory}: {error}", fix=fix) from error
    return directory


def materialize(name: str) -> Path:
    """The pipeline folder of an embedded model in the user's cache, made on the first call.

    The folder's name carries `recipe_key(name)`, so a folder of another diffc is never taken. Processes that
    want it at the same time wait for the first. Raises DiffcError as `make` does.
    """
    return make(name, cache_dir() / "models" / f"{name}-{recipe_key(name)}")


def recipe_key(name: str) -> str:
    """Twelve hex digits that change with the code and weights here that make the model, and the libraries under it."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    sources = sorted(here.glob("tiny*.py"))
    if name.startswith("digits-"):
        sources += [
            *sorted(here.glob("digits*.py")),
            *sorted((here / "data" / "digits").glob("*.safetensors")),
        ]
    for path in sources:
        digest.update(path.read_bytes())
    for library in ("diffusers", "transformers", "tokenizers", "safetensors", "torch", "numpy"):
        digest.update(f"{library} {metadata.version(library)}".encode())
    return digest.hexdigest()[:12]


def cache_dir() -> Path:
    """diffc's folder for what can be made again: DIFFC_CACHE, else the platform's place for caches."""
    if chosen := os.environ.get("DIFFC_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "diffc" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "diffc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffc"


def _write(name: str, directory: Path) -> None:
    """Build the pipeline into `directory`; the manifest, which says that it is complete, comes last."""
    build = digits.build if name in digits.BACKBONES else tiny.build
    with _quiet():
        build(name).save_pretrained(directory, safe_serialization=True)
    content = {"name": name, "recipe": recipe_key(name), "files": _sizes(directory)}
    content |= {"native": dict(EMBEDDED[name].native)}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and a progress bar for every encoder of a megabyte."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file below `directory` but the manifest, by its path with forward slashes."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(directory).as_posix(): p.stat().st_size for p in files}


def native_of(pipeline: Path) -> dict[str, int]:
    """The size that the embedded model in a folder was trained for; empty where it is not stated, or no such model."""
    stated = _manifest(pipeline).get("native")
    sizes = stated.items() if isinstance(stated, dict) else ()
    return {n: v for n, v in sizes if n in ("height", "width", "frames") and isinstance(v, int) and v > 0}


def _manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an embedded model; empty where there is none."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holds(directory: Path, name: str) -> bool:
    """Whether `directory` is this model, of this recipe, with all its files."""
    content = _manifest(directory)
    files = content.get("files")
    if not isinstance(files, dict) or (content.get("name"), content.get("recipe")) != (
        name,
        recipe_key(name),
    ):
        return False
    return files.items() <= _sizes(directory).items()
