"""Translations that replace the exporter's own where its graph would be invalid, or an engine would not build.

- Splits: the exporter writes SplitToSequence, which ONNX does not define for bfloat16 and the TensorRT-RTX
  parser does not know. We write Split, or Slice where sizes differ or are known only at run time.
- Einsum (the unpatchify of SD3): not defined for bfloat16. It only permutes axes there, so we write Transpose.
- Concatenation of mixed float types (SDXL: 16-bit text_embeds beside float32 sinusoids): torch promotes them, the
  exporter does not, and ONNX Concat takes one type only. We write the casts.
- Squeezing an axis that is not 1: torch leaves it alone, ONNX refuses it. We write Squeeze where the axis is 1 only.
- RMSNorm of float32 values with a 16-bit weight (Kandinsky 5): ONNX gives the type of the weight, torch the wider one.
- Rows repeated as often as a size says (frames): the exporter repeats along the axis before the one that it made.
- Choices between booleans (masks): ONNX Runtime's CPU provider has no Where of them. We write And, Or and Not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from diffc.frontend.quantizers import quantizer_translations


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of torch.onnx.export."""
    aten = torch.ops.aten
    return quantizer_translations() | {
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split_with_sizes,
        aten.cat.default: _cat,
        aten.concat.default: _cat,
        aten.concatenate.default: _cat,
        aten.einsum.default: _einsum,
        aten.squeeze.dim: _squeeze,
        aten.masked_fill.Scalar: _masked_fill,
        aten.masked_fill.Tensor: _masked_fill,
        aten.where.self: _where,
        aten.rms_norm.default: _rms_norm,
        aten.repeat_interleave.self_int: _repeat_interleave,
    }


def _split(self: Any, split_size: Any, dim: int = 0) -> Any:
    from onnxscript import opset23 as op

    length = self.shape[dim] if self.shape is not None else None
    if not isinstance(length, int) or not isinstance(split_size, int):
        return op.SplitToSequence(
            self, split_size, axis=dim
        )  # the number of pieces is known only at run time
    sizes = [min(split_size, length - start) for start in range(0, length, split_size)]
    return _pieces(self, sizes, dim)


def _split_with_sizes(self: Any, split_sizes: Any, dim: int = 0) -> Any:
    return _pieces(self, list(split_sizes), dim)


def _pieces(x: Any, sizes: Sequence[Any], dim: int) -> Any:
    """One piece per size along `dim`; sizes are ints or scalar INT64 values."""
    from onnxscript import opset23 as op

    if len(sizes) == 1:
        return [op.Identity(x)]
    if all(isinstance(size, int) for size in sizes) and len(set(sizes)) == 1:
        return op.Split(x, axis=dim, num_outputs=len(sizes))
    pieces, start = [], op.Constant(value_ints=[0])
    for size in sizes:
        step = op.Constant(value_ints=[size]) if isinstance(size, int) else op.Reshape(size, [1])
        end = op.Add(start, step)
        pieces.append(op.Slice(x, start, end, op.Constant(value_ints=[dim])))
        start = end
    return pieces


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    from onnxscript import opset23 as op

    kept = [t for t in tensors if not _is_empty_legacy(t)]
    types = {t.dtype for t in kept}
    if len(types) > 1:
        import onnx

        to = int(onnx.helper.np_dtype_to_tensor_dtype(np.result_type(*(_promotable(t) for t in types))))
        kept = [t if int(t.dtype) == to else op.Cast(t, to=to) for t in kept]
    return op.Identity(kept[0]) if len(kept) == 1 else op.Concat(*kept, axis=dim)


def _is_empty_legacy(tensor: Any) -> bool:
    """Whether torch ignores the tensor in a concatenation (1-D, of length 0); ONNX does not."""
    return tensor.shape is not None and len(tensor.shape) == 1 and tensor.shape[0] == 0


def _promotable(dtype: Any) -> Any:
    """The numpy type of an onnx_ir type; numpy promotes float16 or bfloat16 beside float32 to float32."""
    return dtype.numpy()


def _einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:
    from onnxscript import opset23 as op

    del path
    source, _, target = equation.replace(" ", "").partition("->")
    if len(tensors) == 1 and sorted(source) == sorted(target) and len(set(source)) == len(source):
        return op.Transpose(tensors[0], perm=[source.index(letter) for letter in target])
    return op.Einsum(*tensors, equation=equation)


def _squeeze(self: Any, dim: int) -> Any:
    from onnxscript import opset23 as op

    if self.shape is None or self.shape[dim] == 1:
        return op.Squeeze(self, op.Constant(value_ints=[dim]))
    return op.Identity(self)


def _masked_fill(self: Any, mask: Any, value: Any) -> Any:
    from onnxscript import opset23 as op

    if self.dtype != ir.DataType.BOOL:
        return op.Where(mask, op.CastLike(value, self), self)
    if isinstance(value, bool | int | float):
        return op.Or(self, mask) if value else op.And(self, op.Not(mask))
    return op.Or(op.And(mask, op.Cast(value, to=int(ir.DataType.BOOL))), op.And(op.Not(mask), self))


def _rms_norm(x: Any, size: Any, weight: Any = None, eps: float | None = None) -> Any:
    from onnxscript import opset23 as op

    if weight is None:
        weight = op.Constant(value=ir.tensor(np.ones([int(n) for n in size], x.dtype.numpy())))
    epsilon = float(torch.finfo(torch.float32).eps) if eps is None else eps
    if x.dtype == ir.DataType.FLOAT != weight.dtype:
        weight = op.Cast(weight, to=int(x.dtype))
    return op.RMSNormalization(x, weight, axis=-len(size), epsilon=epsilon)


def _where(condition: Any, self: Any, other: Any) -> Any:
    from onnxscript import opset23 as op

    if self.dtype != ir.DataType.BOOL:
        return op.Where(condition, self, other)
    return op.Or(op.And(condition, self), op.And(op.Not(condition), other))


def _repeat_interleave(self: Any, repeats: Any, dim: int | None = None, output_size: Any = None) -> Any:
    """[.., n, ..] -> [.., n, 1, ..] -> [.., n, repeats, ..] -> [.., n * repeats, ..]"""
    from onnxscript import opset23 as op

    del output_size  # the exporter passes it; it follows from the rest
    x = op.Reshape(self, [-1]) if dim is None else self
    rank = 1 if dim is None else len(self.shape)
    axis = (dim or 0) % rank
    count = op.Constant(value_ints=[repeats]) if isinstance(repeats, int) else op.Reshape(repeats, [-1])
    before, after = [1] * (axis + 1), [1] * (rank - axis - 1)
    ones = [op.Constant(value_ints=before), count, *([op.Constant(value_ints=after)] if after else [])]
    tiled = op.Expand(op.Unsqueeze(x, [axis + 1]), op.Concat(*ones, axis=0))
    sides = [op.Shape(x, end=axis)] if axis else []
    sides += [op.Constant(value_ints=[-1])]
    sides += [op.Shape(x, start=axis + 1)] if after else []
    return op.Reshape(tiled, op.Concat(*sides, axis=0))
