"""Layers as tools write them, against the arithmetic that the tools publish, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.stored.decode import Statement, decode
from diffc.models.stored.held import Decoded
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from passes.weights.stored_operations import swizzled

Array = npt.NDArray[Any]
E4M3, E2M1 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float4_e2m1fn)
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
N, K = 32, 64
RNG = np.random.default_rng(11)


def decoded(tensors: dict[str, Array], said: Statement | None = None) -> Decoded:
    return decode(
        {k: Recipe.of_array(np.asarray(v)) for k, v in tensors.items()}, said or Statement(), "file"
    )


def number(value: float) -> Array:
    return np.array(value, np.float32)


def comfy(**told: Any) -> Array:
    return np.frombuffer(json.dumps(told).encode(), np.uint8)


def float8(rows: int = N, columns: int = K) -> Array:
    return RNG.normal(size=(rows, columns)).astype(np.float32).astype(E4M3)


def nibbles(rows: int = N, columns: int = K) -> Array:
    return RNG.integers(0, 16, (rows, columns), dtype=np.uint8)


def block_scales(rows: int, blocks: int) -> Array:
    return RNG.uniform(0.5, 200, (rows, blocks)).astype(np.float32).astype(E4M3)


class TestFloat8:
    @pytest.mark.parametrize("names", [("weight_scale", "input_scale"), ("scale_weight", "scale_input")])
    def test_codes_times_the_scale(self, names: tuple[str, str]) -> None:
        codes = float8()
        found = decoded({"a.weight": codes, f"a.{names[0]}": number(0.37), f"a.{names[1]}": number(0.02)})
        layer = found.held["a"]
        expected = codes.astype(np.float32) * np.float32(0.37)
        np.testing.assert_array_equal(evaluate(layer.weight), expected)
        np.testing.assert_array_equal(evaluate(found.weights["a.weight"]), expected)
        assert (layer.kind, layer.input and layer.input.kind) == ("fp8", "fp8")
        assert layer.input is not None
        assert layer.input.scale is not None
        assert evaluate(layer.input.scale) == np.float32(0.02)

    def test_the_codes_of_the_file_are_what_is_stored(self) -> None:
        codes = float8()
        recipe = decoded({"a.weight": codes, "a.weight_scale": number(0.37)}).held["a"].weight
        assert [op.name for op in recipe.ops] == ["dequantize"]
        assert bytes.fromhex(recipe.source.key) == codes.tobytes()

    def test_a_scale_for_each_row(self) -> None:
        codes, scale = float8(), RNG.uniform(0.1, 1, N).astype(np.float32)
        found = decoded({"a.weight": codes, "a.weight_scale": scale.reshape(N, 1)})
        np.testing.assert_array_equal(
            evaluate(found.held["a"].weight), codes.astype(np.float32) * scale[:, None]
        )

    def test_no_scale_at_all(self) -> None:
        codes, bias = float8(), RNG.normal(size=N).astype(np.float32).astype(E4M3)
        found = decoded({"a.weight": codes, "a.bias": bias})
        np.testing.assert_array_equal(evaluate(found.weights["a.weight"]), codes.astype(np.float32))
        assert found.held["a"].input is None
        assert evaluate(found.weights["a.bias"]).dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            evaluate(found.weights["a.bias"]).astype(np.float32), bias.astype(np.float32)
        )

    def test_comfyui_writes_one_for_an_input_that_it_leaves(self) -> None:
        tensors = {"a.weight": float8(), "a.scale_weight": number(0.5), "a.scale_input": number(1.0)}
        assert decoded(tensors | {"scaled_fp8": np.zeros(0, E4M3)}).held["a"].input is None
        tensors["a.scale_input"] = number(0.25)
        assert decoded(tensors | {"scaled_fp8": np.zeros(0, E4M3)}).held["a"].input is not None
        assert decoded(tensors | {"scaled_fp8": np.zeros(2, E4M3)}).held["a"].input is None

    def test_e5m2_becomes_plain_values(self) -> None:
        codes = RNG.normal(size=(N, K)).astype(ml_dtypes.float8_e5m2)
        found = decoded({"a.weight": codes, "a.scale_weight": number(0.5)})
        assert not found.held
        np.testing.assert_array_equal(
            evaluate(found.weights["a.weight"]), codes.astype(np.float32) * np.float32(0.5)
        )

    def test_blocks_of_rows_and_columns_become_plain_values(self) -> None:
        codes, scale = float8(), RNG.uniform(0.1, 1, (2, 4)).astype(np.float32)
        found = decoded({"a.weight": codes, "a.weight_scale": scale})
        wide = np.repeat(np.repeat(scale, N // 2, 0), K // 4, 1)
        np.testing.assert_array_equal(evaluate(found.weights["a.weight"]), codes.astype(np.float32) * wide)

    def test_bytes_that_comfy_quant_calls_float8(self) -> None:
        codes = float8()
        tensors = {"a.weight": codes.view(np.uint8), "a.weight_scale": number(0.5)}
        found = decoded(tensors | {"a.comfy_quant": comfy(format="float8_e4m3fn")})
        np.testing.assert_array_equal(
            evaluate(found.held["a"].weight), codes.astype(np.float32) * np.float32(0.5)
        )


class TestNvfp4:
    def expected(self, codes: Array, scales: Array, tensor: float) -> Array:
        wide = scales.astype(np.float32) * np.float32(tensor)
        return E2M1_VALUES[codes] * np.repeat(wide, 16, axis=1)

    def test_modelopt_has_the_lower_half_first_and_plain_scales(self) -> None:
        codes, scales = nibbles(), block_scales(N, K // 16)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        tensors = {"a.weight": packed, "a.weight_scale": scales, "a.weight_scale_2": number(0.01)}
        found = decoded(tensors | {"a.input_scale": number(0.003)}, Statement("NVFP4", comfyui=False))
        np.testing.assert_array_equal(evaluate(found.held["a"].weight), self.expected(codes, scales, 0.01))
        assert found.held["a"].input is not None
        assert found.held["a"].input.kind == "nvfp4"

    @pytest.mark.parametrize(("rows", "columns"), [(N, K), (128, 64), (256, 192), (48, 80)])
    def test_comfyui_has_the_upper_half_first_and_scales_in_tiles(self, rows: int, columns: int) -> None:
        codes, scales = nibbles(rows, columns), block_scales(rows, columns // 16)
        packed = codes[:, 0::2] << 4 | codes[:, 1::2]
        tensors = {"a.weight": packed, "a.weight_scale": swizzled(scales), "a.weight_scale_2": number(0.01)}
        found = decoded(tensors | {"a.comfy_quant": comfy(format="nvfp4")})
        np.testing.assert_array_equal(evaluate(found.held["a"].weight), self.expected(codes, scales, 0.01))

    def test_a_tile_is_laid_out_as_nvidia_says(self) -> None:
        scales = np.arange(128 * 8, dtype=np.float32).reshape(128, 8)
        flat = swizzled(scales).reshape(-1)
        for row, column in ((0, 0), (1, 0), (33, 2), (97, 3), (127, 7)):
            place = (column // 4) * 512 + row % 32 * 16 + row // 32 * 4 + column % 4
            assert flat[place] == scales[row, column]

    def test_padding_is_cut_to_the_bias(self) -> None:
        codes, scales = nibbles(), block_scales(N, K // 16)
        packed = codes[:, 0::2] << 4 | codes[:, 1::2]
        tensors = {"a.weight": packed, "a.weight_scale": swizzled(scales), "a.weight_scale_2": number(0.01)}
        found = decoded(tensors | {"a.bias": np.zeros(20, np.float32)}, Statement(comfyui=True))
        np.testing.assert_array_equal(
            evaluate(found.held["a"].weight), self.expected(codes, scales, 0.01)[:20]
        )

    def test_shapes_that_both_layouts_have_are_not_guessed(self) -> None:
        tensors = {"a.weight": nibbles(128, 32), "a.weight_scale": block_scales(128, 4)}
        with pytest.raises(UnsupportedError, match="nothing says whether as ComfyUI or as ModelOpt"):
            decoded(tensors | {"a.weight_scale_2": number(0.01)})


class TestOthers:
    def test_int8_with_scaled_channels(self) -> None:
        codes = RNG.integers(-128, 128, (N, K), dtype=np.int8)
        scale, factor = RNG.uniform(0.1, 1, N).astype(np.float32), RNG.uniform(0.5, 2, K).astype(np.float32)
        tensors = {"a.weight": codes, "a.weight_scale": scale, "a.pre_quant_scale": factor}
        found = decoded(tensors | {"a.input_scale": number(1 / 127)}, Statement("W8A8_SQ_PER_CHANNEL"))
        own = codes.astype(np.float32) * scale[:, None]
        np.testing.assert_array_equal(evaluate(found.held["a"].weight), own)
        np.testing.assert_array_equal(evaluate(found.weights["a.weight"]), own * factor)

    @pytest.mark.parametrize(("algorithm", "kind"), [("W4A16_AWQ", None), ("W4A8_AWQ", "fp8")])
    def test_awq_has_two_rows_in_a_byte(self, algorithm: str, kind: str | None) -> None:
        codes = RNG.integers(-8, 8, (N, 256)).astype(np.int8)
        scale = RNG.uniform(0.1, 1, (N, 2)).astype(np.float32)
        packed = ((codes[0::2] & 15) | (codes[1::2] & 15) << 4).astype(np.uint8)
        tensors = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": number(0.5)}
        tensors |= {"a.input_scale": number(0.5)} if kind else {}
        layer = decoded(tensors, Statement(algorithm)).held["a"]
        np.testing.assert_array_equal(
            evaluate(layer.weight), codes.astype(np.float32) * np.repeat(scale, 128, 1)
        )
        assert (layer.input.kind if layer.input else None) == kind

    @pytest.mark.parametrize("tiled", [False, True])
    def test_mxfp8_scales_are_powers_of_two(self, tiled: bool) -> None:
        codes, powers = float8(), RNG.integers(110, 130, (N, K // 32)).astype(np.uint8)
        stored = swizzled(powers) if tiled else powers
        found = decoded({"a.weight": codes, "a.weight_scale": stored}, Statement("MXFP8", comfyui=tiled))
        wide = np.repeat(2.0 ** (powers.astype(np.float32) - 127), 32, axis=1).astype(np.float32)
        np.testing.assert_array_equal(evaluate(found.held["a"].weight), codes.astype(np.float32) * wide)

    def test_a_mixed_file_has_each_layer_by_what_it_holds(self) -> None:
        plain = RNG.normal(size=(N, K)).astype(np.float16)
        codes = RNG.integers(-128, 128, (N, K), dtype=np.int8)
        tensors = {"a.weight": float8(), "a.weight_scale": number(0.5), "b.weight": plain, "c.weight": codes}
        found = decoded(tensors | {"c.weight_scale": number(0.5)})
        assert found.kinds() == {"fp8": 1, "int8": 1}
        np.testing.assert_array_equal(evaluate(found.weights["b.weight"]), plain)

    def test_a_low_rank_branch_is_part_of_the_weight(self) -> None:
        codes, a, b = (
            float8(),
            RNG.normal(size=(4, K)).astype(np.float32),
            RNG.normal(size=(N, 4)).astype(np.float32),
        )
        tensors = {
            "a.weight": codes,
            "a.weight_scale": number(0.5),
            "a.svdquant_lora_a": a,
            "a.svdquant_lora_b": b,
        }
        found = decoded(tensors)
        expected = codes.astype(np.float64) * 0.5 + b.astype(np.float64) @ a.astype(np.float64)
        np.testing.assert_allclose(evaluate(found.weights["a.weight"]), expected, rtol=1e-6, atol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            ({"a.qweight": np.zeros((2, 2), np.int8)}, "of nunchaku, GPTQ or AWQ"),
            (
                {"a.qweight": np.zeros((2, 2), np.int8), "a.wscales": block_scales(1, 2)},
                r"'a\.wscales' is of nunchaku, whose codes diffc does not read",
            ),
            ({"a.absmax": np.zeros(2, np.float32)}, "bitsandbytes"),
            (
                {
                    "a.weight": np.zeros((2, 2), np.int8),
                    "a.comfy_quant": comfy(format="int8_tensorwise", convrot=True),
                },
                "rotated",
            ),
            (
                {"a.weight": np.zeros((2, 2), np.uint8), "a.weight_scale": number(1.0)},
                "to 4 bits as nothing says what",
            ),
            (
                {"a.weight": np.zeros((2, 2), np.float16), "a.input_scale": number(1.0)},
                "that its tensors do not tell",
            ),
        ],
    )
    def test_what_is_not_read_is_named(self, tensors: dict[str, Array], said: str) -> None:
        with pytest.raises(UnsupportedError, match=said):
            decoded(tensors)

    def test_scales_without_a_weight(self) -> None:
        with pytest.raises(DiffcError, match="a has weight_scale and no weight"):
            decoded({"a.weight_scale": number(1.0)})

    def test_scales_of_another_layer(self) -> None:
        with pytest.raises(DiffcError, match="do not fit each other"):
            decoded({"a.weight": float8(), "a.weight_scale": np.ones(7, np.float32)})
