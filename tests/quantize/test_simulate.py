"""NVFP4 and MXFP8 on the CPU: against ModelOpt's CUDA results, against plain numpy, and inside ModelOpt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from typing import Any

import ml_dtypes
import modelopt.torch.quantization as mtq
import numpy as np
import numpy.typing as npt
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from diffc.quantize import simulate
from diffc.quantize.formats import MXFP8, NVFP4
from diffc.quantize.simulate import cpu_block_quant, mxfp8_fake_quant, nvfp4_fake_quant, nvfp4_round_trip
from passes.weights import block_operations as block_kernels
from tests import DATA

Wide = npt.NDArray[np.float64]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


@dataclass(frozen=True)
class Recorded:
    """One tensor that ModelOpt quantized on a GPU; `amax` for NVFP4."""

    format: str
    group: str
    x: Tensor
    amax: Tensor | None
    cuda: Tensor

    def simulated(self) -> Tensor:
        return mxfp8_fake_quant(self.x) if self.amax is None else nvfp4_fake_quant(self.x, self.amax)

    def differing(self) -> Tensor:
        """Where any bit differs, other than in the payload of NaN."""
        mine = self.simulated()
        return (bits(mine) != bits(self.cuda)) & ~(mine.isnan() & self.cuda.isnan())


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


@cache
def recorded() -> tuple[Recorded, ...]:
    with np.load(DATA / "simulation.npz") as arrays:
        described = json.loads(str(arrays["cases"]))["cases"]
        return tuple(
            Recorded(
                case["format"],
                case["group"],
                torch.from_numpy(arrays[f"x{i}"]).view(getattr(torch, case["dtype"])),
                torch.from_numpy(arrays[f"amax{i}"]) if f"amax{i}" in arrays else None,
                torch.from_numpy(arrays[f"y{i}"]).view(getattr(torch, case["dtype"])),
            )
            for i, case in enumerate(described)
        )


def of(format: str, *, but: tuple[str, ...] = ()) -> Iterator[Recorded]:
    """The cases of a format, without some groups."""
    return (case for case in recorded() if case.format == format and case.group not in but)


def blocks_of(x: npt.NDArray[Any], size: int) -> Wide:
    """[..., K] -> float64 [rows, blocks, size], padded with zeros, by another way than the code's."""
    rows = x.astype(np.float64).reshape(-1, x.shape[-1])
    count = -(-x.shape[-1] // size)
    blocks = np.zeros((len(rows), count * size))
    blocks[:, : x.shape[-1]] = rows
    return blocks.reshape(len(rows), count, size)


def distance_from_ties(case: Recorded) -> Tensor:
    """|x| / b, exactly, as relative distance from the nearest tie of E2M1; the shape of x."""
    assert case.amax is not None
    blocks = np.abs(blocks_of(case.x.float().numpy(), 16))
    s2 = np.float32(case.amax.max()) * np.float32(1 / 2688)
    ratio = blocks.max(-1, keepdims=True).astype(np.float32) / (np.float32(6) * s2)
    b = np.minimum(ratio, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * s2
    quotient = blocks / np.where(b >= np.float32(1e-5), b, 1).astype(np.float64)
    distance = np.abs(quotient[..., None] / TIES - 1).min(-1)
    rows = distance.reshape(len(blocks), -1)[:, : case.x.shape[-1]]
    return torch.from_numpy(rows.reshape(case.x.shape).copy())


def test_data_has_every_kind() -> None:
    groups = {(case.format, case.group, case.x.dtype) for case in recorded()}
    assert len(groups) == 3 * (8 + 10 - 1 + 10 - 8)
    assert {case.x.shape[-1] % 16 for case in of("nvfp4")} == {0, 4, 7, 8}
    assert {case.amax.numel() for case in of("nvfp4") if case.amax is not None} == {1, 6}


def test_nvfp4_is_the_kernel_s_to_the_bit() -> None:
    """But for exact ties, which are a group of their own."""
    for case in of("nvfp4", but=("E2M1 ties",)):
        assert not case.differing().any(), case.group


def test_nvfp4_of_nan_is_the_kernel_s_to_the_bit() -> None:
    """It makes numbers of them, so that a NaN would pass unseen; calibration refuses them."""
    cases = [case for case in of("nvfp4") if case.group == "nan"]
    assert [int(case.differing().sum()) for case in cases] == [0, 0, 0]
    assert all(case.x.isnan().any() and not case.cuda.isnan().any() for case in cases)


def test_nvfp4_ties_go_to_even_or_to_the_kernel_s_neighbour() -> None:
    for case in recorded():
        if case.group != "E2M1 ties":
            continue
        differ = case.differing()
        assert 0.02 < differ.float().mean() < 0.1
        assert distance_from_ties(case)[differ].max() == 0
        x, mine, theirs = (t.double()[differ] for t in (case.x, case.simulated(), case.cuda))
        assert torch.equal((x - mine).abs(), (theirs - x).abs())  # both are as near


def test_mxfp8_is_the_kernel_s_to_the_bit() -> None:
    """But for the sign of zeros, and float32's subnormal numbers, which are a group of their own."""
    for case in of("mxfp8"):
        if case.group == "subnormal" and case.x.dtype != torch.float16:
            continue
        differ = case.differing()
        assert not (differ & (case.x != 0)).any(), case.group
        assert torch.equal(case.simulated()[differ], case.cuda[differ])


def test_mxfp8_keeps_the_subnormal_numbers_that_the_kernel_flushes() -> None:
    cases = [case for case in of("mxfp8") if case.group == "subnormal" and case.x.dtype != torch.float16]
    for case in cases:
        differ = case.differing()
        assert differ.float().mean() > 0.9
        assert not case.cuda[differ].any()
        error = (case.simulated().double() - case.x.double()).abs()
        assert error.max() <= case.x.double().abs().max() / 16
    assert len(cases) == 2


def damaged_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "SMALLEST_BLOCK_SCALE", 3e-6)


def damaged_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    bounds = torch.tensor(TIES, dtype=torch.float32) + 0.001

    def round_off(size: Tensor) -> Tensor:
        return values[torch.bucketize(size, bounds)]

    monkeypatch.setattr(simulate, "_round_to_e2m1", round_off)


def damaged_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "E4M3_MAX", 416.0)


def damaged_exponent(monkeypatch: pytest.MonkeyPatch) -> None:
    right = simulate._ceil_log2
    monkeypatch.setattr(simulate, "_ceil_log2", lambda ratio: right(ratio * (1 + 2.0**-20)))


@pytest.mark.parametrize(
    ("damage", "test"),
    [
        (damaged_guard, test_nvfp4_is_the_kernel_s_to_the_bit),
        (damaged_rounding, test_nvfp4_is_the_kernel_s_to_the_bit),
        (damaged_saturation, test_nvfp4_is_the_kernel_s_to_the_bit),
        (damaged_saturation, test_mxfp8_is_the_kernel_s_to_the_bit),
        (damaged_exponent, test_mxfp8_is_the_kernel_s_to_the_bit),
    ],
)
def test_the_comparison_can_fail(
    damage: Callable[[pytest.MonkeyPatch], None], test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch)
    with pytest.raises(AssertionError):
        test()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32])
def test_nvfp4_against_stored_weights(dtype: torch.dtype, size: int) -> None:
    """The recipes of weights compute values and scales in numpy; dequantized, they are the simulation's."""
    x = normal(24, 96, seed=11, dtype=dtype)
    s2 = np.float32(x.float().abs().max()) * np.float32(1 / 2688)
    wide = x.float().numpy()
    values = block_kernels.nvfp4_values(wide, np.array(s2), size).astype(np.float32)
    scales = block_kernels.nvfp4_scales(wide, np.array(s2), size).astype(np.float32) * s2
    expected = torch.from_numpy(values * scales.repeat(size, axis=-1)).to(dtype)
    assert torch.equal(nvfp4_fake_quant(x, x.abs().max(), size), expected)
    assert torch.equal(nvfp4_round_trip(x, torch.tensor(s2), size), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32])
def test_mxfp8_against_stored_weights(dtype: torch.dtype, size: int) -> None:
    x = normal(24, 96, seed=12, dtype=dtype)
    values = block_kernels.mxfp8_values(x.float().numpy(), size).astype(np.float32)
    exponents = block_kernels.mxfp8_scales(x.float().numpy(), size).astype(np.int32) - 127
    expected = torch.from_numpy(np.ldexp(values, exponents.repeat(size, axis=-1))).to(dtype)
    assert torch.equal(mxfp8_fake_quant(x, size), expected)


@pytest.mark.parametrize("shape", [(5,), (3, 40), (2, 3, 100), (2, 2, 2, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_blocks_are_filled_with_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape, seed=13, dtype=dtype)
    filled = nn.functional.pad(x, (0, -shape[-1] % 32))
    amax = x.abs().max()
    for result, whole in (
        (nvfp4_fake_quant(x, amax), nvfp4_fake_quant(filled, amax)),
        (mxfp8_fake_quant(x), mxfp8_fake_quant(filled)),
    ):
        assert (result.shape, result.dtype) == (x.shape, dtype)
        assert torch.equal(result, whole[..., : shape[-1]])


@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 96), (96,)])
def test_pieces_make_no_difference(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(*shape, seed=15, dtype=torch.bfloat16)
    whole = nvfp4_fake_quant(x, x.abs().max()), mxfp8_fake_quant(x)
    monkeypatch.setattr(simulate, "_PIECE", 200)
    for result, expected in zip(
        (nvfp4_fake_quant(x, x.abs().max()), mxfp8_fake_quant(x)), whole, strict=True
    ):
        assert torch.equal(result, expected)


def test_takes_views_and_leaves_the_input_alone() -> None:
    x = normal(48, 32, seed=14)
    before = x.clone()
    assert torch.equal(
        nvfp4_fake_quant(x.T, x.abs().max()), nvfp4_fake_quant(x.T.contiguous(), x.abs().max())
    )
    assert torch.equal(mxfp8_fake_quant(x.T), mxfp8_fake_quant(x.T.contiguous()))
    assert torch.equal(x, before)


def quantizer(attributes: Any, amax: Tensor | None) -> Any:
    made: Any = TensorQuantizer(QuantizerAttributeConfig(**attributes))
    if amax is not None:
        made.amax = amax
    return made


def test_modelopt_s_quantizers_run_on_the_cpu() -> None:
    x = normal(4, 6, 64, seed=15, dtype=torch.bfloat16)
    nvfp4, mxfp8 = quantizer(NVFP4, x.abs().max()), quantizer(MXFP8, None)
    with cpu_block_quant():
        assert torch.equal(nvfp4(x), nvfp4_fake_quant(x, x.abs().max()))
        assert torch.equal(mxfp8(x), mxfp8_fake_quant(x))
    for made in (nvfp4, mxfp8):
        with pytest.raises((AssertionError, RuntimeError)):
            made(x)


def test_modelopt_is_left_as_it_was() -> None:
    from modelopt.torch.quantization import tensor_quant

    before = tensor_quant.dynamic_block_quantize_op
    inside = cpu_block_quant()
    inside.__enter__()
    assert tensor_quant.dynamic_block_quantize_op is not before
    assert not inside.__exit__(ValueError, ValueError("raised inside"), None)
    assert tensor_quant.dynamic_block_quantize_op is before


@pytest.mark.parametrize(
    ("attributes", "own"),
    [(NVFP4, False), ({**NVFP4, "block_sizes": {**NVFP4["block_sizes"], -1: 32}}, True), (MXFP8, False)],
)
def test_only_what_modelopt_s_kernels_cannot_leaves_them(
    attributes: Any, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is not on the CPU goes to ModelOpt, except with a block size that its kernel ignores."""
    from modelopt.torch.quantization import tensor_quant

    seen = []

    def kernel(inputs: Tensor, *arguments: Any) -> Tensor:
        seen.append(arguments)
        return inputs

    monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", kernel)
    with cpu_block_quant():
        made = quantizer(attributes, None if attributes is MXFP8 else torch.tensor(3.0))
        assert made(torch.empty(4, 64, device="meta")).shape == (4, 64)
    assert bool(seen) is not own


def test_other_block_formats_are_refused() -> None:
    mxfp4 = {**MXFP8, "num_bits": (2, 1)}
    with cpu_block_quant(), pytest.raises(NotImplementedError, match="E2 blocks of 4 bits"):
        quantizer(mxfp4, None)(normal(4, 64, seed=16))


class Layers(nn.Module):
    """Two linear layers; the input has channels far larger than others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def calibrated_error(attributes: Any, algorithm: Any, dtype: torch.dtype) -> float:
    """Relative error of the output that ModelOpt's calibration by `algorithm` leaves, all of it on the CPU."""
    torch.manual_seed(17)
    model: Any = Layers().to(dtype)
    x = torch.randn(64, 64, dtype=dtype) * torch.exp(2 * torch.randn(64)).to(dtype)
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": attributes},
            {"quantizer_name": "*input_quantizer", "cfg": attributes},
        ],
        "algorithm": algorithm,
    }
    with torch.no_grad(), cpu_block_quant(), redirect_stdout(StringIO()):
        exact = model(x)
        mtq.quantize(model, config, forward_loop=lambda quantized: quantized(x))
        return float((model(x) - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modelopt_calibrates_on_the_cpu(dtype: torch.dtype) -> None:
    svdquant = {"method": "svdquant", "lowrank": 16}
    plain = calibrated_error(NVFP4, "max", dtype)
    assert 0.02 < plain < 0.3
    assert calibrated_error(NVFP4, "awq_lite", dtype) < plain
    assert calibrated_error(NVFP4, svdquant, dtype) < plain
    assert 0.002 < calibrated_error(MXFP8, None, dtype) < plain / 2
