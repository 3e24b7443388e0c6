"""Fast kernels against plain arithmetic: every 16-bit value, random float32 bits, all ways to cut the rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from passes.weights import evaluate as kernels
from passes.weights.block_operations import block_amax, largest
from passes.weights.evaluate import evaluate, tasks, to_bytes
from passes.weights.recipe import Array, Recipe
from passes.weights.rounding import nearest
from passes.weights.sources import keep, np_dtype

RNG = np.random.default_rng(21)
SIXTEEN = (ml_dtypes.bfloat16, np.float16)
TYPES = (*SIXTEEN, np.float32)
FLOATS = (ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn)
BOUND = {TensorProto.FLOAT8E4M3FN: 448.0, TensorProto.INT8: 127.0, TensorProto.INT4: 7.0}


def every_value(dtype: Any) -> Array:
    """All finite values of a 16-bit type, or 65,536 random finite float32 bit patterns; [256, 256]."""
    if np.dtype(dtype).itemsize == 2:
        values = RNG.permutation(np.arange(65536, dtype=np.uint16)).view(dtype)
    else:
        values = RNG.integers(0, 1 << 32, 65536, dtype=np.uint32).view(np.float32)
    finite = np.isfinite(values.astype(np.float32))
    return np.where(finite, values, np.array(0.5, dtype)).astype(dtype).reshape(256, 256)


def weight(dtype: Any, *shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.03).astype(dtype)


@pytest.fixture(params=[(1 << 17, 1 << 22), (1 << 9, 1 << 11)], ids=["large", "small"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and tasks as they are, and so small that everything is cut and every table is used."""
    monkeypatch.setattr(kernels, "_PIECE", request.param[0])
    monkeypatch.setattr(kernels, "_TASK", request.param[1])
    monkeypatch.setattr(kernels, "_TURNED", request.param[1] >> 3)


def same(recipe: Recipe, expected: Array) -> None:
    """Whole and by tasks, the recipe gives the bytes of `expected`, its shape and type."""
    whole = evaluate(recipe)
    assert (
        (whole.shape, whole.dtype)
        == (expected.shape, expected.dtype)
        == (recipe.shape, np_dtype(recipe.dtype))
    )
    wanted = bytes(to_bytes(expected))
    assert bytes(to_bytes(whole)) == wanted
    assert b"".join(bytes(to_bytes(task())) for task in tasks(recipe)) == wanted


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_by_table_is_the_cast(dtype: Any) -> None:
    """Random bits of float32, and every bfloat16 and float16 with its neighbours: ties and what is next to them."""
    for _ in range(4):
        bits = RNG.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
        check_cast(bits.view(np.float32), dtype)
    for kind in SIXTEEN:
        with np.errstate(all="ignore"):
            exact = np.arange(65536, dtype=np.uint16).view(kind).astype(np.float32)
        for step in (-1, 0, 1):
            check_cast((exact.view(np.int32) + step).view(np.float32), dtype)


def check_cast(x: Array, dtype: Any) -> None:
    with np.errstate(all="ignore"):
        expected = x.astype(dtype).view(np.uint8)
        np.testing.assert_array_equal(nearest(x, np.dtype(dtype)).view(np.uint8), expected)


def test_the_check_of_rounding_sees_a_wrong_tie() -> None:
    """Cut off instead of rounded to odd, values just above a tie fall to the wrong side."""
    ties = np.full(1 << 13, 1.0625, np.float32)  # half way between 1 and 1.125 in E4M3
    above = np.nextafter(ties, np.float32(2))
    cut = (above.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert np.all(nearest(above, np.dtype(FLOATS[0])).astype(np.float32) == 1.125)
    assert np.all(nearest(cut, np.dtype(FLOATS[0])).astype(np.float32) == 1.0)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("to", BOUND)
def test_quantized_per_tensor_channel_and_block(to: int, dtype: Any) -> None:
    for x in (every_value(dtype), weight(dtype, 37, 384)):
        amax, rows = np.float32(0.13), RNG.uniform(0.05, 0.2, len(x)).astype(np.float32)
        blocks = RNG.uniform(0.05, 0.2, (len(x), x.shape[1] // 128)).astype(np.float32)
        for axis, block, given, spread in (
            (None, 0, amax, amax),
            (0, 0, rows, rows[:, None]),
            (-1, 128, blocks, np.repeat(blocks, 128, axis=1)),
        ):
            scale = keep(np.asarray(given)).scale_of_amax(BOUND[to])
            recipe = keep(x).quantize(scale, to, axis, block)
            expected = plainly(x, factor(spread, to), to)
            same(recipe, expected)
            same(recipe.transpose((1, 0)), expected.T)


def factor(amax: Array, to: int) -> Array:
    """bound / amax as ModelOpt's tensor_quant.py rounds it."""
    bound = np.float32(BOUND[to])
    return np.float32(1) / amax * bound if to == TensorProto.FLOAT8E4M3FN else bound / amax


def plainly(x: Array, factor: Array, to: int) -> Array:
    bound = BOUND[to]
    low = -bound if to == TensorProto.FLOAT8E4M3FN else -bound - 1
    with np.errstate(over="ignore"):
        scaled = np.clip(x.astype(np.float32) * factor, low, bound)
    return (scaled if to == TensorProto.FLOAT8E4M3FN else np.rint(scaled)).astype(np_dtype(to))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", TYPES)
def test_casts(dtype: Any) -> None:
    x = every_value(dtype)
    for to in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN):
        if np_dtype(to) == x.dtype:
            continue
        with np.errstate(over="ignore"):
            wide = np.clip(x.astype(np.float32), -448, 448) if to == TensorProto.FLOAT8E4M3FN else x
            expected = wide.astype(np_dtype(to))
            same(keep(x).cast(to), expected)
            same(keep(x).transpose((1, 0)).cast(to), expected.T)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", TYPES)
def test_nvfp4_and_mxfp8(dtype: Any) -> None:
    for x in (
        weight(dtype, 50, 384),
        weight(dtype, 3, 4, 96),
        np.clip(every_value(dtype), -1e4, 1e4).astype(dtype),
    ):
        s2 = np.float32(np.abs(x.astype(np.float32)).max() / 2688)
        sixteens = x.astype(np.float32).reshape(*x.shape[:-1], -1, 16)
        scales = np.minimum(np.abs(sixteens).max(-1) / (np.float32(6) * s2), np.float32(448)).astype(
            FLOATS[0]
        )
        step = (scales.astype(np.float32) * s2)[..., None]
        values = np.clip(sixteens / np.where(step >= np.float32(1e-5), step, np.float32(1)), -6, 6)
        scale = Recipe.of_array(s2)
        same(keep(x).nvfp4_scales(scale), scales)
        same(keep(x).nvfp4_values(scale), values.astype(FLOATS[1]).reshape(x.shape))
        wide = keep(x).nvfp4_values(scale).cast(TensorProto.FLOAT8E4M3FN)
        same(wide, values.astype(FLOATS[1]).astype(np.float32).astype(FLOATS[0]).reshape(x.shape))
        blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
        amax = np.abs(blocks).max(-1)
        exponents = np.ceil(np.log2(np.where(amax == 0, 448, amax) / 448)).clip(-127, 127).astype(np.int64)
        codes = (
            np.clip(np.ldexp(blocks, -exponents[..., None]), -448, 448).astype(np.float32).astype(FLOATS[0])
        )
        same(keep(x).mxfp8_scales(), (exponents + 127).astype(np.uint8))
        same(keep(x).mxfp8_values(), codes.reshape(x.shape))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", TYPES)
def test_scaled_weights_and_largest_values(dtype: Any) -> None:
    x = weight(dtype, 45, 64)
    columns, rows = (RNG.uniform(0.5, 2, shape).astype(np.float32) for shape in ((1, 64), (45, 1)))
    left, right = (RNG.standard_normal(shape).astype(np.float32) * 0.01 for shape in ((45, 4), (4, 64)))
    wide = x.astype(np.float32)
    same(keep(x).multiply(keep(columns)), (wide * columns).astype(dtype))
    same(keep(x).multiply(keep(rows)), (wide * rows).astype(dtype))
    same(keep(x).multiply(keep(columns[:, :1])), (wide * columns[0, 0]).astype(dtype))
    product = left.astype(np.float64) @ right.astype(np.float64)
    same(
        keep(x).subtract_product(keep(left), keep(right)),
        (x.astype(np.float64) - product).astype("f4").astype(dtype),
    )
    same(keep(x).amax(), np.abs(wide).max())
    same(keep(x).multiply(keep(columns)).amax(), np.abs((wide * columns).astype(dtype).astype("f4")).max())
    np.testing.assert_array_equal(block_amax(x, 16)[..., 0], np.abs(wide).reshape(45, 4, 16).max(-1))
    assert largest(np.empty((0, 4), dtype)) == 0


@pytest.mark.usefixtures("pieces")
def test_shapes_of_all_kinds() -> None:
    x = weight(np.float16, 6, 8, 3, 3)
    same(
        keep(x).transpose((1, 0, 2, 3)).reshape((8, 54)).cast(TensorProto.FLOAT),
        x.swapaxes(0, 1).reshape(8, 54).astype("f4"),
    )
    same(keep(x).reshape((6, 72)).transpose((1, 0)), x.reshape(6, 72).T)
    same(keep(x[:0]), x[:0])
    same(keep(x[:0]).cast(TensorProto.FLOAT), x[:0].astype("f4"))
    same(keep(np.float16(2.5).reshape(())).cast(TensorProto.FLOAT), np.asarray(np.float32(2.5)))
    line = weight(np.float32, 4001)
    same(keep(line).cast(TensorProto.FLOAT16), line.astype("f2"))
    same(
        keep(line).quantize(Recipe.of_array(np.float32(0.01)), TensorProto.INT4),
        plainly(line, np.float32(1) / np.float32(0.01), TensorProto.INT4),
    )


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("shape", [(601, 307), (64, 4100), (5000, 33)])
@pytest.mark.parametrize(
    "to", [TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT]
)
def test_a_large_weight_is_turned_after_it_was_cast(to: int, shape: tuple[int, int]) -> None:
    x = (RNG.standard_normal(shape) * 3).astype(np.float32)
    expected = x.astype(np_dtype(to))
    same(keep(x).cast(to).transpose((1, 0)), expected.T)
    same(keep(expected).transpose((1, 0)), expected.T)
