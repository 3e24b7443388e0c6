"""The command line that repeats a compile, from the request that its manifest holds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from diffc.backends.target import EngineOptions
from diffc.compile.request import CompileRequest
from diffc.quantize.options import QuantOptions

PROMPTS = "prompts.txt"
"""The file that the command names for prompts, which the manifest holds one by one."""
_VALUES = (
    *("format", "dtype", "profile", "from_checkpoint", "pipeline", "calib_size", "calibrate", "steps"),
    *("guidance", "negative_prompt", "batch_size", "image_size", "height", "width", "seed"),
    *("lora_slots", "cache_plan", "cache_layout", "passes"),
)
_FLAGS = ("skip_validation", "lora_partial")
_OPTIONS = {"mha": "quantize_mha", "level": "quant_level"}


def command_of(request: Mapping[str, Any], output: str) -> str:
    """`diffc compile ...` as a line for a shell; options at their default are left out.

    `request` is that of a manifest. The place of the prompts is a file `PROMPTS`, if there are any.
    """
    words = ["diffc", "compile", str(request.get("model", "MODEL")), *_words(request), "-o", output]
    return shlex.join(words)


def _words(request: Mapping[str, Any]) -> Iterator[str]:
    default = {field.name: field.default for field in fields(CompileRequest)}
    default = {name: getattr(value, "default", value) for name, value in default.items()}
    for name in _VALUES:
        value = request.get(name)
        if value not in (None, "") and value != default[name]:
            yield from _option(name, value)
    yield from (f"--{name.replace('_', '-')}" for name in _FLAGS if request.get(name))
    for name, one in (("targets", "target"), ("sms", "sm")):
        for value in request.get(name) or ():
            yield from _option(one, value)
    for component, dtype in request.get("component_dtypes") or ():
        yield from _option("component_dtype", f"{component}:{dtype}")
    for lora in request.get("loras") or ():
        patterns = "".join(f",{pattern}={weight:g}" for pattern, weight in lora.get("patterns") or ())
        yield from _option("lora", f"{lora['file']}={lora['weight']:g}{patterns}")
    if request.get("prompts"):
        yield from _option("prompts_file", PROMPTS)
    for group, known in (("options", QuantOptions()), ("engine", EngineOptions())):
        yield from _changed(request.get(group) or {}, asdict(known))
    yield from _changed(request.get("hub") or {}, {})


def _changed(given: Mapping[str, Any], default: Mapping[str, Any]) -> Iterator[str]:
    """The options of a group that are not at their default."""
    for name, value in given.items():
        if value in (None, "", False, [], ()) or value == default.get(name):
            continue
        option = _OPTIONS.get(name, name)
        for one in value if isinstance(value, list) else [value]:
            yield from [f"--{option.replace('_', '-')}"] if one is True else _option(option, one)


def _option(name: str, value: object) -> Iterator[str]:
    yield f"--{name.replace('_', '-')}"
    yield f"{value:g}" if isinstance(value, float) else str(value)
