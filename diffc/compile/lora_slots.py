"""--lora-slots: for each graph of ONNX Runtime, one with low-rank slots over the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx

from diffc.errors import DiffcError, UnsupportedError, UsageError
from diffc.models.sources.source import ModelSource
from passes.graph.check import check_structure
from passes.targets.ort.lora_slots import Slot, slots_to_json, with_lora_slots

if TYPE_CHECKING:
    from diffc.compile.request import CompileRequest

TARGET, FILE, MOST = "ort", "model-lora.onnx", 1024


@dataclass(frozen=True)
class SlottedGraph:
    """The graph with slots, and the slots by module path."""

    model: onnx.ModelProto
    slots: Mapping[str, Slot]
    rank: int

    def described(self, source: ModelSource) -> dict[str, Any]:
        """The manifest's entry."""
        return {
            "rank": self.rank,
            "files": {TARGET: FILE},
            "layers": slots_to_json(self.slots),
            "parameters": {name: list(recipe.shape) for name, recipe in source.weights.items()},
        }


def check_slots(request: CompileRequest) -> None:
    """Raise DiffcError when slots were asked for where there are none."""
    if not request.lora_slots:
        return
    if not 1 <= request.lora_slots <= MOST:
        raise UsageError(f"--lora-slots is {request.lora_slots}", fix=f"give the highest rank, 1 to {MOST}")
    if set(request.targets) != {TARGET}:
        raise UnsupportedError(
            f"LoRA slots are there for target {TARGET} alone",
            fix=f"give --target {TARGET}, or fuse LoRAs for the others: --lora, or diffc relora later",
        )
    if request.cache_plan:
        raise UnsupportedError(
            "a model of a cache plan has no LoRA slots", fix="leave out --cache-plan or --lora-slots"
        )


def slotted(
    models: Mapping[str, onnx.ModelProto], files: Mapping[str, str], rank: int
) -> SlottedGraph | None:
    """The graph of `TARGET` with slots, of `models` by file name and the file of each target; None without a rank.

    Raises DiffcError when it has no linear layer.
    """
    if not rank:
        return None
    model, slots = with_lora_slots(models[files[TARGET]])
    if not slots:
        raise DiffcError(
            "the graph has no linear layer that could have a LoRA slot", fix="leave out --lora-slots"
        )
    check_structure(None, model, None)
    return SlottedGraph(model, slots, rank)
