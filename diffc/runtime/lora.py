"""LoRAs that a compiled backbone takes while it is loaded: files -> values of the graph's low-rank slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from diffc.backends.torch_types import TORCH_TYPES
from diffc.errors import DiffcError
from diffc.models.sources.lora_files import LoraSpec, lora_path, parse_lora
from diffc.tensors import tensor_of
from passes.base import PassError
from passes.targets.ort.lora_slots import Slot
from passes.weights.lora.changes import Change
from passes.weights.lora.fuse import Applied, apply_files, changes_by_parameter

_FIX = "fuse it: diffc relora ARTIFACT --lora FILE, or diffc compile --lora FILE"


@dataclass(frozen=True)
class LoraSlots:
    """The slots of a compiled model: `rank` is the most that all LoRAs together may have in a layer.

    `slots` by module path; `shapes` are those of all parameters of the model, by which files are matched.
    """

    rank: int
    slots: Mapping[str, Slot]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, manifest: Mapping[str, Any], target: str) -> LoraSlots | None:
        """The slots of a target in a manifest; None for a compile without, and for other targets."""
        found = manifest.get("lora_slots")
        if found is None or target not in found["files"]:
            return None
        slots = {module: Slot(module, *sizes) for module, sizes in found["layers"].items()}
        return cls(found["rank"], slots, {name: tuple(shape) for name, shape in found["parameters"].items()})

    def values(
        self,
        files: Sequence[str | Path | LoraSpec],
        weights: Sequence[float] | None,
        *,
        partial: bool,
        device: torch.device,
    ) -> tuple[dict[str, Tensor], list[Applied]]:
        """The factors of every slot that `files` fill, by input name, on `device`, and what was applied.

        Ranks of several files are joined. Weights go into B, in float32. Raises DiffcError for a file that does not
        fit, for what no slot can hold (all but LoRA on linear layers) unless `partial`, and for too high a rank.
        """
        specs = [_spec(file) for file in files]
        if weights is not None:
            if len(weights) != len(specs):
                raise DiffcError(
                    f"{len(specs)} LoRAs have {len(weights)} weights", fix="give one weight for each"
                )
            specs = [LoraSpec(s.file, float(w), s.patterns) for s, w in zip(specs, weights, strict=True)]
        try:
            applied = apply_files([(lora_path(s), s.strength) for s in specs], self.shapes, partial=partial)
        except PassError as error:
            raise DiffcError(str(error)) from error
        found: dict[str, Tensor] = {}
        for name, changes in changes_by_parameter(applied).items():
            slot = self.slots.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            fitting = [change for change in changes if slot is not None and _fits(change)]
            if len(fitting) < len(changes) and not partial:
                raise DiffcError(f"{name} is changed by {_what(changes)}, which no slot can hold", fix=_FIX)
            if slot is not None and fitting:
                found |= self._factors(slot, fitting, device)
        return found, applied

    def _factors(self, slot: Slot, changes: Sequence[Change], device: torch.device) -> dict[str, Tensor]:
        a, b = zip(*(_pair(change, slot) for change in changes), strict=True)
        rank = sum(part.shape[1] for part in a)
        if rank > self.rank:
            raise DiffcError(
                f"the LoRAs have rank {rank} in {slot.module}, and the slots were compiled for {self.rank}",
                fix=f"compile with --lora-slots {rank}",
            )
        dtype = TORCH_TYPES[TensorProto.DataType.Name(slot.dtype)]
        return {
            slot.a: torch.cat(a, dim=1).to(device, dtype).contiguous(),
            slot.b: torch.cat(b, dim=0).to(device, dtype).contiguous(),
        }


def _spec(file: str | Path | LoraSpec) -> LoraSpec:
    if isinstance(file, LoraSpec):
        return file
    return LoraSpec(str(file)) if isinstance(file, Path) else parse_lora(file)


def _fits(change: Change) -> bool:
    """Whether a change is a plain product."""
    return change.left is not None and change.decomposition is None


def _what(changes: Sequence[Change]) -> str:
    kinds = {"a DoRA" if change.decomposition else f"a {change.kind}" for change in changes}
    return " and ".join(sorted(kinds))


def _pair(change: Change, slot: Slot) -> tuple[Tensor, Tensor]:
    """A [inputs, rank] and B [rank, outputs] of one change, in float32, the scale in B."""
    assert change.left is not None
    assert change.right is not None
    up = tensor_of(change.left, torch.float32).reshape(slot.outputs, -1)
    down = tensor_of(change.right, torch.float32).reshape(up.shape[1], slot.inputs)
    return down.T, up.T * (change.scale * change.weight)
