"""A pipeline of diffusers made from the configurations in its folder: no weight is read, no encoder runs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, TypeGuard

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.capture.stand_ins import Backbone, TextEncoder, Vae, tokenizer
from diffc.models.config_check import check_numbers
from diffc.models.sources.inside import inside
from diffc.models.sources.json_files import read_index, read_json

_UNLIMITED = 512
"""Tokens of a tokenizer whose configuration states no length."""
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder", "image_processor", "watermarker")


_UNCALLED = ("vae", "audio_vae", "vqvae", "vocoder")
"""Components that run after the backbone; others of diffusers run before it, and are made with one layer."""


class Stage:
    """A pipeline with stand-ins: `pipe` itself, and the stand-in of its backbone, whose calls are looked at."""

    def __init__(self, folder: Path, component: str):
        """The pipeline of the folder `folder`. Raises DiffcError where it cannot be made from configurations."""
        import diffusers

        self.folder, self.index = folder, read_index(folder)
        name = str(self.index.get("_class_name"))
        self.cls: Any = getattr(diffusers, name, None)
        if self.cls is None:
            raise UnsupportedError(
                f"{folder}: diffusers has no pipeline {name}, and the inputs of its backbone are read off calls of it",
                fix="upgrade diffusers, or write a family file: CONTRIBUTING.md, Adding a model family",
            )
        self.backbone = Backbone(empty_model(folder / component))
        self.lengths: dict[str, int] = {}
        parts = self._parts(component)
        try:
            self.pipe = self.cls(**parts)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise DiffcError(
                f"{name} cannot be made from the configurations in {folder}: {error}",
                fix="download the whole pipeline again",
            ) from error
        self.pipe.set_progress_bar_config(disable=True)

    def _parts(self, component: str) -> dict[str, Any]:
        """Every argument of the pipeline's constructor."""
        parts: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(self.cls).parameters.items()):
            entry = self.index.get(name)
            if name == component:
                parts[name] = self.backbone
            elif is_component(entry):
                parts[name] = self._part(name, entry)
            elif entry is not None:
                parts[name] = entry
            elif parameter.default is inspect.Parameter.empty:
                parts[name] = None
        return parts

    def _part(self, name: str, entry: list[Any]) -> Any:
        """The stand-in of one component: `entry` is its library and class."""
        library, kind = entry
        if kind is None or name in _OPTIONAL:
            return None
        if any(word in str(kind) for word in ("Tokenizer", "Processor")):
            self.lengths[name] = self._length(name)
            return tokenizer(self.lengths[name])
        if library == "transformers":
            return TextEncoder(self._encoder_config(name), projects="WithProjection" in str(kind))
        cls = _class_of(str(library), str(kind))
        return None if cls is None else self._of_diffusers(name, cls)

    def _of_diffusers(self, name: str, cls: Any) -> Any:
        if (self.folder / name / "scheduler_config.json").is_file():
            return cls.from_pretrained(self.folder / name, local_files_only=True)
        if "scheduler" in name:
            return cls()
        place = self.folder / name / "config.json"
        config = read_json(inside(self.folder, name) / "config.json") if place.is_file() else {}
        if cls is type(self.backbone.real):
            return Backbone(empty_model(self.folder / name), self.backbone.calls)  # an expert for other times
        if "Autoencoder" in cls.__name__ or name in _UNCALLED:
            return Vae(cls, config)
        return cls.from_config({k: min(v, 1) if k.endswith("num_layers") else v for k, v in config.items()})

    def _length(self, name: str) -> int:
        place = self.folder / name / "tokenizer_config.json"
        length = read_json(place).get("model_max_length") if place.is_file() else None
        return length if isinstance(length, int) and 0 < length < 1 << 20 else _UNLIMITED

    def _encoder_config(self, name: str) -> Any:
        from transformers import AutoConfig

        place = inside(self.folder, name)
        if not (place / "config.json").is_file():
            raise DiffcError(
                f"{place / 'config.json'} is not there, and the width of the prompt's embeddings is read from it",
                fix="download the whole pipeline; of the text encoders, the configurations are enough here",
            )
        check_numbers(read_json(place / "config.json"), place / "config.json")
        return AutoConfig.from_pretrained(place, local_files_only=True)


def is_component(entry: Any) -> TypeGuard[list[Any]]:
    """Whether an entry of model_index.json is library and class; another list is a value (numbers of layers)."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str | None) for part in entry)


def _class_of(library: str, kind: str) -> Any:
    """A class that model_index.json names: one of diffusers, or of one of its pipelines (LTX-2's connectors)."""
    import diffusers

    place = diffusers if library == "diffusers" else getattr(diffusers.pipelines, library, None)
    return getattr(place, kind, None)


def empty_model(folder: Path) -> Any:
    """The diffusers model of a component's config.json: parameters without values, buffers with theirs."""
    import diffusers
    from accelerate import init_empty_weights

    config = read_json(folder / "config.json")
    check_numbers(config, folder / "config.json")
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise UnsupportedError(
            f"{folder / 'config.json'}: diffusers has no model of class {config.get('_class_name')}",
            fix="upgrade diffusers",
        )
    try:
        with init_empty_weights(include_buffers=False):
            return cls.from_config(config).eval()
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, NotImplementedError) as error:
        raise DiffcError(
            f"diffusers cannot make a {cls.__name__} from {folder / 'config.json'}: {error}",
            fix="take config.json and weights of the same model again",
        ) from error
