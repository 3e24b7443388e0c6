"""The interface of a pipeline in memory: its configurations are written out, and read as those of a folder are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffc.models.capture.capture import capture
from diffc.models.interface import Interface
from diffc.models.spec import Config


def capture_object(pipe: Any, component: str, config: Config) -> Interface:
    """The interface of the backbone `component` of the pipeline object `pipe`; `config` is its config.json.

    The object is not called and not changed. Raises UnsupportedError and DiffcError as `capture` does.
    """
    with TemporaryDirectory(prefix="diffc-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        _write(folder / "model_index.json", _index(pipe))
        for name, part in pipe.components.items():
            for file, content in _configurations(part):
                _write(folder / name / file, content)
        _write(folder / component / "config.json", config)
        return capture(folder, component)


def _index(pipe: Any) -> Mapping[str, Any]:
    """model_index.json of the pipeline, under the name of the class of diffusers that it is or comes from."""
    import diffusers

    known = (c.__name__ for c in type(pipe).__mro__ if getattr(diffusers, c.__name__, None) is c)
    return {**pipe.config, "_class_name": next(known, type(pipe).__name__)}


def _configurations(part: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Files of a component that `capture` reads, with their contents: a tokenizer's length, the config of others."""
    tokenizer = getattr(part, "tokenizer", part)
    if hasattr(tokenizer, "model_max_length"):
        yield "tokenizer_config.json", {"model_max_length": tokenizer.model_max_length}
        return
    config: Any = getattr(part, "config", None)
    file = getattr(part, "config_name", "config.json")
    if hasattr(part, "to_json_string") and hasattr(part, "config_name"):  # a model or scheduler of diffusers
        yield file, json.loads(part.to_json_string())
    elif hasattr(config, "to_dict"):  # a model of transformers
        yield file, json.loads(config.to_json_string(use_diff=False))


def _write(place: Path, content: Mapping[str, Any]) -> None:
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(content, default=str), encoding="utf-8")
