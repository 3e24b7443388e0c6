"""What only the backbone itself can tell: its results, and which sizes it takes. It runs on tensors without values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffc.errors import UnsupportedError
from diffc.models.interface import Dimension, Input, Output
from diffc.models.nested import Path, nested
from diffc.models.relation import Setting
from diffc.models.rewrites import rewrite_modules
from diffc.models.sources.fake import fake_parameters

_ODD = (5, 7)
"""Rows and columns, in steps, at which a multiple of pixels is tried: neither is a multiple of anything else."""
_MULTIPLES = 5
"""How often a step is doubled until it is given up."""


class Probe:
    """Runs a backbone, whose parameters have no values, at settings: `inputs` say with what."""

    def __init__(
        self,
        model: Any,
        inputs: Sequence[Input],
        dimensions: Sequence[Dimension],
        constants: Sequence[tuple[Path, Any]],
        tuples: Sequence[Path],
    ):
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        rewrite_modules(model)
        self._model, self._inputs, self._dimensions = model, inputs, dimensions
        self._constants, self._tuples = constants, tuples
        fake_parameters(model, self._mode)

    def run(self, setting: Setting) -> tuple[str, dict[str, tuple[int, ...]]]:
        """The "module:class" of the results, and the shape of each by its name. Raises what the model raises."""
        import torch

        sizes = {d.name: int(d.relation.at(setting)) for d in self._dimensions}
        with self._mode, torch.no_grad():
            values = [(i.path, self._value(i, sizes)) for i in self._inputs]
            found = self._model(**nested([*values, *self._constants], self._tuples), return_dict=True)
        named = found.items() if isinstance(found, Mapping) else vars(found).items()
        shapes = {name: tuple(value.shape) for name, value in named if isinstance(value, torch.Tensor)}
        kind = type(found)
        return f"{kind.__module__}:{kind.__qualname__}", shapes

    def _value(self, item: Input, sizes: Mapping[str, int]) -> Any:
        import torch

        shape = [sizes[d] if isinstance(d, str) else d for d in item.dims]
        if item.kind == "size":
            return shape[0]
        types = {"bool": torch.bool, "int64": torch.int64}
        return torch.ones(shape, dtype=types.get(item.dtype, torch.float32))


def outputs_of(
    probe: Probe, dimensions: Sequence[Dimension], first: Input, settings: Sequence[Setting]
) -> tuple[str, tuple[Output, ...]]:
    """Class and results of the backbone, their dimensions named after those of the inputs that have their sizes.

    Raises UnsupportedError with the reason where the backbone does not run on tensors without values, and for a
    size that no input has.
    """
    try:
        runs = [probe.run(setting) for setting in settings]
    except Exception as error:  # whatever a model raises is the reason of the refusal
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"the backbone does not run on tensors without values, which a trace needs: {type(error).__name__}:"
            f" {reason}",
            fix="write a family file for this class: CONTRIBUTING.md, Adding a model family",
        ) from error
    sizes = [{d.name: int(d.relation.at(s)) for d in dimensions} for s in settings]
    outputs = []
    for number, (field, shape) in enumerate(runs[0][1].items()):
        dims = list[str | int]()
        for axis, size in enumerate(shape):
            seen = [run[1][field][axis] for run in runs]
            dim = _dimension(axis, seen, sizes, first.dims) if len(set(seen)) > 1 else size
            if dim is None:
                raise UnsupportedError(
                    f"axis {axis} of the result {field} has sizes {seen}, which no input has",
                    fix="add a family for this class: CONTRIBUTING.md",
                )
            dims.append(dim)
        name = f"out_{first.name}" + (f"_{number}" if number else "")
        outputs.append(Output(name, tuple(dims), field))
    return runs[0][0], tuple(outputs)


def _dimension(
    axis: int, seen: Sequence[int], sizes: Sequence[Mapping[str, int]], likely: Sequence[str | int]
) -> str | None:
    """The dimension that has the sizes `seen`; the one that the first input has on the same axis comes first."""
    names = [n for n in (*likely[axis : axis + 1], *sizes[0]) if isinstance(n, str)]
    return next(
        (n for n in names if all(run[n] == size for run, size in zip(sizes, seen, strict=True))), None
    )


def pixel_multiple(
    probe: Probe,
    config: Mapping[str, Any],
    output: Output,
    step: int,
    base: Setting,
    dimensions: Sequence[Dimension],
) -> int:
    """Pixels that height and width are multiples of: the least multiple of `step` at which results have their size.

    A UNet meets its skip connections only where every level divides evenly; diffusers then interpolates instead,
    which one graph cannot hold beside the plain way. So its levels count as well.
    """
    levels = config.get("block_out_channels") if "up_block_types" in config else None
    multiple = step * 2 ** (len(levels) - 1) if levels else step
    for _ in range(_MULTIPLES):
        setting = {**base, "height": _ODD[0] * multiple, "width": _ODD[1] * multiple}
        if _runs(probe, setting, output, dimensions):
            return multiple
        multiple *= 2
    raise UnsupportedError(
        f"the backbone runs at no size: multiples of {step} to {multiple} px were tried",
        fix="add a family for this class: CONTRIBUTING.md",
    )


def _runs(probe: Probe, setting: Setting, output: Output, dimensions: Sequence[Dimension]) -> bool:
    sizes = {d.name: int(d.relation.at(setting)) for d in dimensions}
    try:
        shape = probe.run(setting)[1][output.field]
    except Exception:  # any error says that the size does not fit
        return False
    return shape == tuple(sizes[d] if isinstance(d, str) else d for d in output.dims)
