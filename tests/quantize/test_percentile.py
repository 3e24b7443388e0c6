"""Percentile calibration against the same formulas in plain numpy, and without the bug of ModelOpt's script."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from diffc.errors import DiffcError
from diffc.quantize.convert import insert_quantizers
from diffc.quantize.formats import FORMATS
from diffc.quantize.percentile import METHODS, PercentileCalibrator, use_percentile

Table = npt.NDArray[np.float32]
FORMULAS = {
    "global_min": lambda a: a.min(),
    "min-max": lambda a: a.max(axis=0).min(),
    "min-mean": lambda a: a.mean(axis=0).min(),
    "mean-max": lambda a: a.max(axis=0).mean(),
}
"""amax [batches, steps] -> what each method is documented to make of it."""


def tensors(batches: int, steps: int, seed: int) -> list[list[torch.Tensor]]:
    """[batch][step]: normal tensors whose spread changes with the step, as along a denoising."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(2, 3, 5, 5, generator=generator) * (0.2 + abs(step - steps / 3))
            for step in range(steps)
        ]
        for _ in range(batches)
    ]


def amax_table(data: list[list[torch.Tensor]]) -> Table:
    return np.array([[np.abs(x.numpy()).max() for x in batch] for batch in data], dtype=np.float32)


def collected(method: str, percentile: float, data: list[list[torch.Tensor]]) -> float:
    calibrator = PercentileCalibrator(percentile, len(data[0]), method)
    for batch in data:
        for x in batch:
            calibrator.collect(x)
    amax = calibrator.compute_amax()
    assert amax is not None
    assert (amax.shape, amax.dtype) == ((), torch.float32)
    return float(amax)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("percentile", "kept"), [(1.0, 10), (0.7, 7), (0.35, 3), (0.01, 1)])
@pytest.mark.parametrize("batches", [1, 4])
def test_formula(method: str, percentile: float, kept: int, batches: int) -> None:
    data = tensors(batches, 10, seed=kept + batches)
    expected = FORMULAS[method](amax_table(data)[:, :kept])
    assert collected(method, percentile, data) == pytest.approx(expected, rel=1e-6)


def test_methods_differ() -> None:
    """The data of these tests tell the methods apart."""
    data = tensors(4, 10, seed=1)
    values = [collected(method, 1.0, data) for method in METHODS]
    assert min(abs(a - b) / b for i, a in enumerate(values) for b in values[:i]) > 0.01


def test_share_of_steps_is_not_lost_to_rounding() -> None:
    data = tensors(1, 100, seed=2)
    assert collected("mean-max", 0.29, data) == pytest.approx(amax_table(data)[:, :29].mean(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_depend_on_the_number_of_batches(method: str) -> None:
    """With identical data; ModelOpt's min-mean goes from 0.1 to 1.6 times the right value here."""
    data = tensors(1, 10, seed=3)
    once = collected(method, 1.0, data)
    assert [collected(method, 1.0, data * count) / once for count in (2, 5, 16)] == pytest.approx([1, 1, 1])


def test_half_precision_is_averaged_in_float32() -> None:
    data = [[x.to(torch.float16) for x in batch] for batch in tensors(7, 5, seed=4)]
    expected = amax_table(data).astype(np.float64).mean(axis=0).min()
    assert collected("min-mean", 1.0, data) == pytest.approx(expected, rel=1e-6)


def test_a_batch_cut_short_counts_where_it_got() -> None:
    data = tensors(2, 6, seed=5)
    calibrator = PercentileCalibrator(1.0, 6, "min-mean")
    for x in data[0] + data[1][:3]:
        calibrator.collect(x)
    table = amax_table(data)
    expected = min(*table.mean(axis=0)[:3], *table[0, 3:])
    assert float(calibrator.compute_amax()) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]


def test_reset_forgets() -> None:
    calibrator = PercentileCalibrator(1.0, 2, "min-max")
    assert calibrator.compute_amax() is None
    calibrator.collect(torch.full((3,), 0.5))
    calibrator.reset()
    assert calibrator.compute_amax() is None
    calibrator.collect(torch.tensor([-7.0, 2.0]))
    assert float(calibrator.compute_amax()) == 7.0  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(AssertionError, match="nan or inf"):
        PercentileCalibrator(1.0, 2, "min-max").collect(torch.tensor([1.0, bad]))


@pytest.mark.parametrize(
    ("percentile", "steps", "method", "says"),
    [(0.0, 4, "min-max", "share of steps"), (1.5, 4, "min-max", "share"), (1.0, 0, "min-max", "at least 1")],
)
def test_refuses_settings(percentile: float, steps: int, method: str, says: str) -> None:
    with pytest.raises(DiffcError, match=says):
        PercentileCalibrator(percentile, steps, method)


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(DiffcError, match="min-mean"):
        PercentileCalibrator(1.0, 2, "max-median")


class Mixed(nn.Module):
    """Two convolutions, one of them to stay unquantized, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(self.conv(torch.tanh(self.conv_in(x))).mean((2, 3)))
        return out


def calibrated(data: list[list[torch.Tensor]], method: str | None) -> tuple[Any, dict[str, list[float]]]:
    """The model calibrated by ModelOpt on `data`, and max |input| of conv and linear at every call."""
    torch.manual_seed(6)
    model: Any = Mixed().eval()
    seen: dict[str, list[float]] = {"conv": [], "linear": []}
    insert_quantizers(model, FORMATS["int8"], "conv_in$")
    if method is not None:
        assert use_percentile(model, 0.5, len(data[0]), method) == 1
    for name in seen:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(float(args[0].abs().max()))
        )

    def run(_: nn.Module) -> None:
        for batch in data:
            for x in batch:
                model(x)

    with torch.no_grad(), redirect_stdout(StringIO()):
        mtq.calibrate(model, "max", forward_loop=run)
    return model, seen


@pytest.mark.parametrize("method", METHODS)
def test_modelopt_calibrates_convolutions_with_it(method: str) -> None:
    model, seen = calibrated(tensors(3, 8, seed=7), method)
    table = np.array(seen["conv"], dtype=np.float32).reshape(3, 8)
    amax = float(model.conv.input_quantizer.amax)
    assert amax == pytest.approx(FORMULAS[method](table[:, :4]), rel=1e-6)
    assert amax != pytest.approx(table.max(), rel=1e-3)


def test_everything_else_keeps_max() -> None:
    data = tensors(3, 8, seed=7)
    changed, seen = calibrated(data, "min-mean")
    plain, _ = calibrated(data, None)
    assert float(changed.linear.input_quantizer.amax) == pytest.approx(max(seen["linear"]))
    assert torch.equal(changed.conv.weight_quantizer.amax, plain.conv.weight_quantizer.amax)
    assert torch.equal(changed.linear.input_quantizer.amax, plain.linear.input_quantizer.amax)
    assert not hasattr(changed.conv_in, "input_quantizer") or not changed.conv_in.input_quantizer.is_enabled
