"""quantize-softmax: against FP8 attention in torch, and the kernel that TensorRT-RTX takes for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto

from passes import Pipeline
from passes.canonical.fuse_qdq import FuseQdq
from passes.targets.tensorrt.decompose_attention import DecomposeAttention
from passes.targets.tensorrt.quantize_softmax import QuantizeSoftmax
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, error, model, ops, run_ort

TYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
AMAX = {"q": 4.0, "k": 3.5, "v": 3.25}


def attention(
    attrs: str = "",
    mask: str = "",
    kind: str = "float",
    heads: int = 4,
    kv: int = 4,
    size: int = 16,
    **scales: Any,
) -> ModelProto:
    """Quantized queries, keys and values of 4 dimensions, and Attention."""
    extra, name = (f", {mask} m", ", m") if mask else ("", "")
    quantized = "".join(
        f"{x}q = QuantizeLinear({x}, s{x}, z{x})\n{x}d = DequantizeLinear({x}q, s{x}, z{x})\n" for x in "qkv"
    )
    text = f"""g ({kind}[b,{heads},s,{size}] q, {kind}[b,{kv},t,{size}] k, {kind}[b,{kv},t,{size}] v{extra})
        => ({kind}[b,{heads},s,{size}] y) {{ {quantized} y = Attention{attrs}(qd, kd, vd{name}) }}"""
    values = {f"s{x}": np.array(AMAX[x] / 448, TYPES[kind]) for x in "qkv"}
    values |= {f"z{x}": np.array(0, ml_dtypes.float8_e4m3fn) for x in "qkv"}
    return model(text, values | scales)


def feeds(
    b: int = 2,
    s: int = 5,
    t: int = 7,
    heads: int = 4,
    kv: int = 4,
    size: int = 16,
    seed: int = 0,
    kind: str = "float",
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (b, heads, s, size), "k": (b, kv, t, size), "v": (b, kv, t, size)}
    return {name: rng.standard_normal(shape).astype(TYPES[kind]) for name, shape in shapes.items()}


def fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def expected(values: dict[str, Any], causal: bool = False, scale: float | None = None) -> np.ndarray:
    """FP8 attention in torch and float32, with a fake quantizer where the pass promises one."""
    q, k, v = (fp8(torch.from_numpy(values[x]).float(), float(np.float32(AMAX[x] / 448))) for x in "qkv")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = values.get("m")
    if mask is not None and mask.dtype == np.bool_:
        scores = scores.masked_fill(~torch.from_numpy(mask), -torch.inf)
    elif mask is not None:
        scores = scores + torch.from_numpy(mask)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    rows = fp8(scores.softmax(-1).nan_to_num(0.0), 147 * 2.0**-16)
    return (rows @ v).numpy()


def masks(kind: str, rows_closed: bool) -> np.ndarray:
    mask = np.random.default_rng(4).random((2, 1, 5, 7)) > 0.4
    mask[..., 0] = True
    if rows_closed:
        mask[1, 0, 2] = False
    if kind == "bool":
        return mask
    return np.where(mask, np.random.default_rng(5).standard_normal(mask.shape), -np.inf).astype(np.float32)


def check(made: ModelProto, values: dict[str, Any], **options: Any) -> ModelProto:
    """Run the pass; compare with torch, and with the graph before, which must be near and not the same."""
    result = apply(made, QuantizeSoftmax())
    assert result.changed == 1
    assert result.records[0].refusals == ()
    got = run_ort(result.model, values)[0]
    # A probability next to the edge between two steps may fall to the other side: a few do, of thousands.
    assert error(got, expected(values, **options)) < 2e-3
    assert 1e-3 < error(got, run_ort(made, values)[0]) < QuantizeSoftmax.tolerance
    return result.model


class TestNumbers:
    @pytest.mark.parametrize(("attrs", "options"), [("", {}), ("<scale=0.7>", {"scale": 0.7})])
    def test_against_torch(self, attrs, options):
        for seed in range(3):
            check(attention(attrs), feeds(seed=seed), **options)

    @pytest.mark.parametrize("rows_closed", [False, True])
    @pytest.mark.parametrize(("mask", "kind"), [("float[b,1,s,t]", "float"), ("bool[b,1,s,t]", "bool")])
    def test_masks(self, mask, kind, rows_closed):
        values = feeds() | {"m": masks(kind, rows_closed)}
        after = check(attention(mask=mask), values)
        if rows_closed:
            closed = run_ort(after, values)[0][1, :, 2]
            np.testing.assert_array_equal(closed, np.zeros_like(closed))

    def test_causal_and_a_mask_with_it(self):
        check(attention("<is_causal=1>"), feeds(s=7), causal=True)
        values = feeds() | {"m": masks("bool", False)}
        check(attention("<is_causal=1>", "bool[b,1,s,t]"), values, causal=True)
        values = feeds() | {"m": masks("float", False)}
        check(attention("<is_causal=1>", "float[b,1,s,t]"), values, causal=True)

    def test_fewer_key_heads(self):
        check(attention(heads=6, kv=2), feeds(heads=6, kv=2))

    def test_three_dimensions(self):
        text = """g (float[b,s,64] q, float[b,t,64] k, float[b,t,64] v) => (float[b,s,64] y) {
            qq = QuantizeLinear(q, sq, z)
            qd = DequantizeLinear(qq, sq, z)
            kq = QuantizeLinear(k, sk, z)
            kd = DequantizeLinear(kq, sk, z)
            vq = QuantizeLinear(v, sv, z)
            vd = DequantizeLinear(vq, sv, z)
            y = Attention<q_num_heads=4, kv_num_heads=4>(qd, kd, vd)
        }"""
        scales = {f"s{x}": np.float32(AMAX[x] / 448) for x in "qkv"}
        made = model(text, scales | {"z": np.array(0, ml_dtypes.float8_e4m3fn)})
        values = feeds()
        flat = {
            x: np.ascontiguousarray(a.transpose(0, 2, 1, 3)).reshape(*a.shape[::2], 64)
            for x, a in values.items()
        }
        got = run_ort(apply(made, QuantizeSoftmax()).model, flat)[0]
        assert error(got, expected(values).transpose(0, 2, 1, 3).reshape(got.shape)) < 2e-3

    def test_a_wrong_softmax_scale_shows(self):
        after = apply(attention(), QuantizeSoftmax()).model
        scale = next(t for t in after.graph.initializer if t.name.endswith("softmax_scale"))
        scale.CopyFrom(onnx.numpy_helper.from_array(np.array(1 / 500, np.float32), scale.name))
        values = feeds(t=2)
        assert error(run_ort(after, values)[0], expected(values)) > 1e-2

    def test_float16(self):
        values = feeds(kind="float16")
        got = run_ort(apply(attention(kind="float16"), QuantizeSoftmax()).model, values)[0]
        assert error(got.astype(np.float32), expected(values)) < 1e-2


class TestPattern:
    def test_each_pair_is_right_at_its_matmul(self):
        after = apply(attention(), QuantizeSoftmax()).model
        assert sorted(ops(after)) == sorted(
            ["Transpose", *["QuantizeLinear", "DequantizeLinear"] * 4, "MatMul", "Softmax", "MatMul"]
        )
        makers = {node.output[0]: node.op_type for node in after.graph.node}
        for node in after.graph.node:
            if node.op_type == "MatMul":
                assert [makers[name] for name in node.input] == ["DequantizeLinear"] * 2

    def test_scales_that_are_recipes(self):
        recipe = Recipe.of_array(np.array(AMAX["q"], np.float32)).scale_of_amax(448)
        check(attention(sq=recipe), feeds())

    def test_what_others_read_stays(self):
        made = attention()
        made.graph.node.append(onnx.helper.make_node("Relu", ["kd"], ["r"], "relu"))
        made.graph.output.append(onnx.helper.make_tensor_value_info("r", TensorProto.FLOAT, None))
        after = apply(made, QuantizeSoftmax()).model
        np.testing.assert_array_equal(run_ort(after, feeds())[1], run_ort(made, feeds())[1])

    def test_shapes_are_not_read_from_the_pairs_that_were(self):
        after = apply(attention("<is_causal=1>"), QuantizeSoftmax()).model
        assert ops(after).count("QuantizeLinear") == ops(after).count("DequantizeLinear") == 4

    def test_fuse_qdq_leaves_it_alone(self):
        after = apply(attention(), QuantizeSoftmax()).model
        assert Pipeline([FuseQdq()]).run(after).changed == 0


class TestRefused:
    def refused(self, made: ModelProto, **options: Any) -> str:
        result = Pipeline([QuantizeSoftmax(**options)]).run(made)
        assert result.changed == 0
        assert result.model.graph.node == made.graph.node or "Attention" in ops(result.model)
        found = result.records[0].refusals
        return found[0].reason if found else ""

    @pytest.mark.parametrize(
        ("attrs", "reason"), [("<softcap=1.5>", "softcap"), ("<softmax_precision=10>", "softmax_precision")]
    )
    def test_attributes(self, attrs, reason):
        assert reason in self.refused(attention(attrs))

    def test_large_heads(self):
        assert "head size" in self.refused(attention(), max_head_dim=8)

    def test_only_some_are_quantized(self):
        made = attention()
        made.graph.node[-1].input[2] = "v"
        assert "only some" in self.refused(made)

    def test_other_formats(self):
        made = attention(**{f"z{x}": np.int8(0) for x in "qkv"})
        assert self.refused(made) == ""
        made = attention(sk=np.full(4, 0.01, np.float32), zk=np.zeros(4, ml_dtypes.float8_e4m3fn))
        assert "only some" in self.refused(made)

    def test_nothing_is_quantized(self):
        made = attention()
        del made.graph.node[:6]
        made.graph.node[0].input[:] = ["q", "k", "v"]
        assert self.refused(made) == ""


def engine(folder: Path, made: ModelProto, sm: int, size: int) -> bytes:
    """The engine that TensorRT-RTX builds, as bytes."""
    from diffc.backends.profile import Profile
    from tests.networks import build

    names = [value.name for value in made.graph.input]
    profile = Profile.of_shapes(
        *(
            {x: (b, *((1, n, n) if x == "m" else (4, n, size))) for x in names}
            for b, n in ((1, 128), (1, 512), (2, 1024))
        )
    )
    return build(folder, made, (sm,), profiles=(profile,)).path.read_bytes()


class TestEngine:
    """An engine holds the source of its fused attention kernel, which names the types that it multiplies."""

    FP8_KERNEL = rb"fmha::\w*e4m3\w*_traits"

    @pytest.mark.parametrize(
        ("kind", "sm", "size", "mask"),
        [
            ("float16", 89, 64, ""),
            ("bfloat16", 120, 128, ""),
            ("float16", 120, 128, "float16[b,1,s,t]"),
            ("bfloat16", 89, 64, "bool[b,1,s,t]"),
        ],
    )
    def test_tensorrt_takes_its_fp8_kernel(self, tmp_path, kind, sm, size, mask):
        pytest.importorskip("tensorrt_rtx")
        made = attention(kind=kind, size=size, mask=mask)
        after = apply(made, QuantizeSoftmax(), FuseQdq()).model
        assert re.search(self.FP8_KERNEL, engine(tmp_path / "pass", after, sm, size))

    def test_not_for_one_node_nor_for_its_plain_pieces(self, tmp_path):
        """Why the pass exists: queries, keys and values in FP8 are not enough."""
        pytest.importorskip("tensorrt_rtx")
        made = attention(kind="float16", size=64)
        plain = apply(made, DecomposeAttention(dtypes=("float16",))).model
        for name, graph in (("node", made), ("pieces", plain)):
            assert not re.search(self.FP8_KERNEL, engine(tmp_path / name, graph, 89, 64))
