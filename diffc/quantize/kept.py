"""What a calibration has collected so far, kept in files, so that one that was interrupted goes on.

ModelOpt's methods run the prompts once, twice or three times, and compute between the runs what follows from the
quantizers' state alone. So a file for each run with that state, after its newest batch, is all it takes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.files.atomic import write_bytes

_AWQ = ("act_scale", "num_cache_steps", "num_search_steps", "num_tokens", "loss")
"""What ModelOpt's awq_lite adds up beside the quantizers."""


class KeptRuns:
    """The state after the newest batch of each run, in `folder`; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def take_up(self, backbone: nn.Module, run: int) -> int:
        """Give the quantizers the state that is kept of a run, and return how many batches it has behind it."""
        file = self._file(run)
        if file is None or not file.is_file():
            return 0
        kept = torch.load(file, weights_only=True)
        for name, quantizer in _quantizers(backbone):
            _put(quantizer, kept["quantizers"].get(name, {}))
        for name, helper in _helpers(backbone):
            for field, value in kept["awq"].get(name, {}).items():
                setattr(helper, field, value)
        return int(kept["batches"])

    def keep(self, backbone: nn.Module, run: int, batches: int) -> None:
        """Write the state after `batches` batches of a run."""
        file = self._file(run)
        if file is None:
            return
        awq = {name: {field: getattr(helper, field) for field in _AWQ} for name, helper in _helpers(backbone)}
        states = {name: _state(quantizer) for name, quantizer in _quantizers(backbone)}
        content = io.BytesIO()
        torch.save({"batches": batches, "quantizers": states, "awq": awq}, content)
        write_bytes(file, content.getvalue())

    def _file(self, run: int) -> Path | None:
        return None if self._folder is None else self._folder / f"run-{run}.pt"


def _quantizers(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    from modelopt.torch.quantization.nn import TensorQuantizer

    return ((name, m) for name, m in backbone.named_modules() if isinstance(m, TensorQuantizer))


def _helpers(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, m.awq_lite) for name, m in backbone.named_modules() if hasattr(m, "awq_lite"))


def _state(quantizer: Any) -> dict[str, Any]:
    calibrator = quantizer._calibrator
    fields = ("_calib_amax", "_amaxes")  # of ModelOpt's, and of `diffc.quantize.percentile`
    found = {
        field: getattr(calibrator, field) for field in fields if getattr(calibrator, field, None) is not None
    }
    amax = getattr(quantizer, "_amax", None)
    return found if amax is None else {**found, "amax": amax}


def _put(quantizer: Any, state: dict[str, Any]) -> None:
    for field, value in state.items():
        if field == "amax":
            quantizer.reset_amax()
            quantizer.amax = value
        else:
            setattr(quantizer._calibrator, field, value)
