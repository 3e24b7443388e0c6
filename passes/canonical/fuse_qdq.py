"""fuse-qdq: each tensor is quantized once, and dequantized where it is multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, Refusal, register
from passes.canonical.merge_duplicates import merge_duplicates, reuse_quantized
from passes.canonical.quantizer_part import Part
from passes.canonical.sink_dequantizers import sink_dequantizers
from passes.graph.edit import Edit


@register
@dataclass(frozen=True)
class FuseQdq(Pass):
    """Remove and move QuantizeLinear (Q) and DequantizeLinear (DQ) without changing a number.

    A compiler fuses a DQ into the MatMul, Gemm, Conv or Attention that reads it, and pays for every other one.
    Moves of data are Transpose, Reshape, Flatten, Squeeze, Unsqueeze, Identity, Slice, Split, Gather on
    constant indices, Expand, Tile, DepthToSpace, SpaceToDepth and Concat. In order, until nothing changes:

    1. Quantizers, dequantizers (`trt` ones too), casts and moves that compute the same from the same are one.
    2. DQ -> moves -> Q with the same scale, zero point and type: only the moves stay, on quantized data.
       All codes of the type are tried against the scale, so that no code comes back as another.
    3. Two Q of one tensor with the same grid, one of them or both after moves: one Q before the moves,
       unless that would quantize more elements than now.
    4. Q -> DQ -> move -> MatMul, Gemm, Conv, ConvTranspose or Attention: the pair moves after the move where
       nothing else reads it (Concat: of all its inputs). Otherwise, where ONNX and its runtimes have the move
       for the quantized type, only the DQ does, and the move works on quantized data.

    A scale per channel follows its axis through Transpose and reshapes that keep it whole, and through Slice,
    Split and Concat of other axes.

    Declines when: there are blocks; scales differ (share-scales makes them equal); the data is a weight
    (fold-weight-layout moves these); an output of the graph would get another type.
    """

    name: ClassVar[str] = "fuse-qdq"

    def run(self, graph: gs.Graph) -> PassResult:
        """Sweep until a sweep changes nothing: each removes nodes, or moves a DQ closer to the outputs."""
        counts = _Counts()
        while counts.sweep(graph):
            pass
        return PassResult(counts.changed, counts.notes(), counts.refusals)


@dataclass
class _Counts:
    """What the sweeps did; the refusals are those of the last one."""

    merged: int = 0
    reused: int = 0
    moved: int = 0
    refusals: tuple[Refusal, ...] = ()

    @property
    def changed(self) -> int:
        return self.merged + self.reused + self.moved

    def sweep(self, graph: gs.Graph) -> bool:
        """All steps once on the graph and its subgraphs; whether anything changed."""
        before, edit = self.changed, Edit(graph)
        for body in edit.view.parts:
            part = Part.of(body, edit)
            if part is None:
                continue
            self.merged += merge_duplicates(part)
            self.reused += reuse_quantized(part)
            self.moved += sink_dequantizers(part)
        self.refusals = edit.refusals
        return self.changed > before

    def notes(self) -> tuple[str, ...]:
        said = ((self.merged, "duplicates merged"), (self.reused, "Q removed"), (self.moved, "moves crossed"))
        return (", ".join(f"{n} {what}" for n, what in said if n),) if self.changed else ()
