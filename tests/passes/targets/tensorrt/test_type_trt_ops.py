from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from passes import Pass, PassError, Pipeline
from passes.canonical.fold_constants import FoldConstants
from passes.graph.from_onnx import import_graph
from passes.graph.inference import shell
from passes.graph.to_onnx import export_graph
from passes.graph.trt_ops import TRT_OPS
from passes.targets.ort.add_trt_functions import AddTrtFunctions
from passes.targets.ort.emulate_fp4 import EmulateFp4
from passes.targets.tensorrt.type_trt_ops import TypeTrtOps
from tests import SHARED
from tests.passes.graph_helpers import apply, count_calls, model
from tests.passes.trt_helpers import trt_model

FIXTURES = SHARED / "fixtures" / "modelopt-0.47-flux"
E4M3, FP4, UINT8 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1, TensorProto.UINT8
Type = tuple[int, tuple[int | str | None, ...]]


def types(made: onnx.ModelProto) -> dict[str, Type]:
    """Element type and dimensions of every value that the main graph describes; symbols that ONNX made are None."""
    found = {}
    for value in (*made.graph.value_info, *made.graph.output, *made.graph.input):
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
        shape = tuple(None if isinstance(d, str) and d.startswith("unk_") else d for d in dims)
        found[value.name] = tensor.elem_type, shape
    return found


def untyped(graph: onnx.GraphProto, shapes: bool = True) -> list[str]:
    """Outputs of nodes, in subgraphs too, that have no element type or (with `shapes`) no shape."""
    values = (*graph.value_info, *graph.output, *graph.input)
    known = {
        value.name
        for value in values
        if value.type.tensor_type.elem_type and (value.type.tensor_type.HasField("shape") or not shapes)
    }
    left = [name for node in graph.node for name in node.output if name and name not in known]
    bodies = [item.g for node in graph.node for item in node.attribute if item.HasField("g")]
    return left + [name for body in bodies for name in untyped(body, shapes)]


def check_strictly(made: onnx.ModelProto) -> None:
    """Everything typed, and ONNX finds no contradiction."""
    assert untyped(made.graph) == []
    onnx.shape_inference.infer_shapes(shell(made), strict_mode=True, check_type=True, data_prop=True)
    onnx.checker.check_model(shell(made), full_check=True)


EVERY_OPERATOR = """g (float16[n,t,64] x, float s2, float16 s, float16[n,t,2] bs) =>
    (float16[n,t,64] a, float[n,t,64] c, bfloat16[n,t,64] f, float16[n,t,64] h, float16[n,t,64] i, int8 [n,t,64] j) {
        p = trt.TRT_FP8QuantizeLinear(x, s)
        a = trt.TRT_FP8DequantizeLinear(p, s)
        q4, qs = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>(x, s2)
        b = DequantizeLinear(qs, s2)
        c = DequantizeLinear<axis = -1, block_size = 16>(q4, b)
        d = trt.TRT_FP4QDQ<block_size = 16>(x)
        m, ms = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>(d)
        f = trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = 16>(m, ms)
        g = trt.TRT_INT4QuantizeLinear<axis = 2, block_size = 32>(x, bs)
        h = trt.TRT_INT4DequantizeLinear<axis = 2, block_size = 32>(g, bs)
        j = trt.QuantizeLinear(x, s, zero)
        k = trt.QuantizeLinear<output_dtype = 17>(x, s)
        l = Transpose<perm = [0, 2, 1]>(k)
        r = Transpose<perm = [0, 2, 1]>(l)
        i = trt.DequantizeLinear(r, s)
        z = Relu(d)
    }"""


def every_operator() -> onnx.ModelProto:
    return trt_model(EVERY_OPERATOR, {"zero": np.array(0, np.int8)})


def test_every_operator_of_the_table() -> None:
    made = every_operator()
    assert {node.op_type for node in made.graph.node if node.domain == "trt"} == TRT_OPS.keys()
    typed = apply(made, TypeTrtOps()).model
    check_strictly(typed)
    full, half = ("n", "t", 64), TensorProto.FLOAT16
    want: dict[str, Type] = {
        "p": (E4M3, full),
        "a": (half, full),
        "q4": (FP4, full),
        "qs": (E4M3, ("n", "t", 4)),
        "b": (TensorProto.FLOAT, ("n", "t", 4)),
        "c": (TensorProto.FLOAT, full),
        "d": (half, full),
        "m": (E4M3, full),
        "ms": (UINT8, ("n", "t", 2)),
        "f": (TensorProto.BFLOAT16, full),
        "g": (TensorProto.INT4, full),
        "h": (half, full),
        "j": (TensorProto.INT8, full),
        "k": (E4M3, full),
        "l": (E4M3, ("n", 64, "t")),
        "r": (E4M3, full),
        "i": (half, full),
        "z": (half, full),
    }
    found = types(typed)
    assert {name: found[name] for name in want} == want
    assert "k" not in types(made)


def test_names_do_not_matter() -> None:
    """The same graph with every tensor and node called something that says otherwise."""
    made = every_operator()
    rename: dict[str, str] = {}
    kept = {value.name for value in (*made.graph.input, *made.graph.output)} | {"zero"}
    for node in made.graph.node:
        for place, name in enumerate(node.output):
            if name not in kept:
                rename[name] = f"QuantizeLinear_fp8_scale_{len(rename)}"
                node.output[place] = rename[name]
        for place, name in enumerate(node.input):
            node.input[place] = rename.get(name, name)
        node.name = f"weight_quantizer_{node.output[0]}"
    found, plain = (types(apply(m, TypeTrtOps()).model) for m in (made, every_operator()))
    assert {rename.get(name, name): value for name, value in plain.items()} == found


def test_wrong_types_of_an_exporter_are_corrected_everywhere_behind_them() -> None:
    made = trt_model(
        """g (float16[n,32] x, float16 s) => (float16[n,32] y, uint8[n,32] kept) <uint8[n,32] q, uint8[32,n] t> {
            q = trt.TRT_FP8QuantizeLinear(x, s)
            t = Transpose<perm = [1, 0]>(q)
            u = Transpose<perm = [1, 0]>(t)
            y = trt.TRT_FP8DequantizeLinear(u, s)
            kept = Identity(q)
        }"""
    )
    result = apply(made, TypeTrtOps())
    found = types(result.model)
    assert {found[name] for name in ("q", "u", "kept")} == {(E4M3, ("n", 32))}
    assert found["t"] == (E4M3, (32, "n"))
    assert result.records[0].changed >= 4
    check_strictly(result.model)
    with pytest.raises(AssertionError):
        check_strictly(made)


def test_unknown_and_symbolic_last_dimensions() -> None:
    made = trt_model(
        """g (float[n,k] x, float s, float y, int64[2] shape) => (float[a,b] out) {
            q, bs = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16>(x, s)
            r = Reshape(x, shape)
            p, ps = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32>(r)
            out = trt.TRT_MXFP8DequantizeLinear(p, ps)
        }"""
    )
    found = types(apply(made, TypeTrtOps()).model)
    assert found["q"] == (FP4, ("n", "k"))
    assert found["bs"] == (E4M3, ("n", None))
    assert found["p"] == (E4M3, (None, None))
    assert found["ps"] == (UINT8, (None, None))
    assert found["out"] == (TensorProto.FLOAT, ("a", "b"))


def chain(count: int) -> onnx.ModelProto:
    """Each quantizer feeds the next through a MatMul, so that no type or shape is known before the last one's."""
    lines, x = [], "x"
    for i in range(count):
        lines += [
            f"q{i}, b{i} = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>({x}, s)",
            f"c{i} = DequantizeLinear(b{i}, s)",
            f"d{i} = DequantizeLinear<axis = -1, block_size = 16>(q{i}, c{i})",
            f"h{i} = Cast<to = 10>(d{i})",
            f"x{i} = MatMul(h{i}, {'w' if i % 2 == 0 else 'v'})",
        ]
        x = f"x{i}"
    text = f"g (float16[n,64] x, float s) => (float16[n,m] y) {{ {'  '.join(lines)}  y = Relu({x}) }}"
    rng = np.random.default_rng(1)
    shapes = {"w": (64, 32), "v": (32, 64)}
    return trt_model(
        text, {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    )


def test_a_chain_of_hundreds_is_typed_in_one_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = apply(chain(300), TypeTrtOps()).model
    check_strictly(typed)
    found = types(typed)
    assert found["b299"] == (E4M3, ("n", 2))
    assert found["b298"] == (E4M3, ("n", 4))

    infer, runs = onnx.shape_inference.infer_shapes, []

    def counted(*args: Any, **options: Any) -> onnx.ModelProto:
        runs.append(1)
        return infer(*args, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    TypeTrtOps().run(import_graph(chain(300)))
    assert len(runs) == 1


@pytest.mark.parametrize("step", [TypeTrtOps(), EmulateFp4(), AddTrtFunctions()], ids=lambda step: step.name)
def test_work_is_linear_in_nodes(step: Pass) -> None:
    graphs = [import_graph(chain(count)) for count in (100, 500)]
    for graph in graphs if step.name != "type-trt-ops" else ():
        TypeTrtOps().run(graph)
    few, many = (count_calls(lambda graph=graph: step.run(graph)) for graph in graphs)
    assert 2 * few < many < 5.5 * few


def test_subgraphs() -> None:
    made = trt_model(
        """g (bool c, float16[n,64] x, float16 s) => (float16[n,64] y) <uint8[n,64] q> {
            q = trt.TRT_FP8QuantizeLinear(x, s)
            y = If<then_branch = then () => (float16[n,64] a) {
                    i = Identity(q)
                    a = trt.TRT_FP8DequantizeLinear(i, s)
                }, else_branch = other () => (float16[n,64] b) {
                    i, j = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32>(x)
                    b = trt.TRT_MXFP8DequantizeLinear<output_dtype = 10>(i, j)
                }>(c)
        }"""
    )
    typed = apply(made, TypeTrtOps()).model
    check_strictly(typed)
    (branch,) = (node for node in typed.graph.node if node.op_type == "If")
    inner = [{v.name: v.type.tensor_type for v in item.g.value_info} for item in branch.attribute]
    assert [body["i"].elem_type for body in inner] == [E4M3, E4M3]
    assert (inner[1]["j"].elem_type, inner[1]["j"].shape.dim[1].dim_value) == (UINT8, 2)
    assert types(typed)["q"] == (E4M3, ("n", 64))


def test_operators_that_nobody_knows_are_refused_and_their_own_types_kept() -> None:
    made = trt_model(
        """g (float[n,32] x, float s) => (float8e4m3fn[n,32] y, float[n,2] z) <float[n,32] a> {
            a = own.Known(x)
            b = trt.TRT_Attention(x, x, x)
            y = trt.TRT_FP8QuantizeLinear(a, s)
            z = own.Other(b)
        }"""
    )
    made.opset_import.add(domain="own", version=1)
    result = Pipeline((TypeTrtOps(),)).run(made)
    found = types(result.model)
    assert found["a"] == (TensorProto.FLOAT, ("n", 32))
    (refusal,) = result.records[0].refusals
    assert "no type is known of output 'b' of TRT_Attention" in refusal.reason


@pytest.mark.parametrize("attributes", ["axis = -1, block_size = 16", "axis = 2, block_size = 8"])
def test_an_axis_that_is_not_whole_blocks_is_refused(attributes: str) -> None:
    made = trt_model(
        f"""g (float[n,24] x, float s) => (float4e2m1[n,24] y, float8e4m3fn[n,m] z) {{
            y, z = trt.TRT_FP4DynamicQuantize<{attributes}>(x, s)
        }}"""
    )
    with pytest.raises(PassError, match=r"TRT_FP4DynamicQuantize node .*is not whole blocks of"):
        Pipeline((TypeTrtOps(),)).run(made)


def test_a_model_without_the_operators_stays() -> None:
    made = model("g (float[n] x) => (float[n] y) { z = Relu(x)  y = Abs(z) }")
    assert Pipeline((TypeTrtOps(),)).run(made).changed == 0


@pytest.mark.parametrize("name", ["fp8", "int4awq", "mxfp8", "w4a8", "nvfp4", "svd"])
def test_exports_of_modelopt(name: str) -> None:
    path = FIXTURES / f"flux_{name}.onnx"
    if not path.exists():
        pytest.skip("needs the shared ModelOpt exports")
    made = onnx.load(path)
    graph = import_graph(made)
    result = TypeTrtOps().run(graph)
    assert result.changed
    assert result.refusals == ()
    assert TypeTrtOps().run(graph).changed == 0
    typed = export_graph(graph, made)
    check_trt_outputs(typed)
    assert untyped(made.graph, shapes=False)
    assert not untyped(typed.graph, shapes=False)
    # What lies behind a Reshape to computed dimensions gets its rank when constants are folded.
    assert len(untyped(typed.graph)) < 0.25 * len(typed.graph.node) < 0.5 * len(untyped(made.graph))
    if name not in (
        "nvfp4",
        "svd",
    ):  # there ModelOpt left a LayerNormalization of FLOAT with a BFLOAT16 scale
        onnx.shape_inference.infer_shapes(shell(typed), strict_mode=True, data_prop=True)
        folded = Pipeline((TypeTrtOps(), FoldConstants())).run(made).model
        check_trt_outputs(folded)
        check_strictly(folded)


def check_trt_outputs(made: onnx.ModelProto) -> None:
    """The outputs of the operators that ModelOpt 0.47 writes have the types that TensorRT gives them."""
    found = types(made)
    constants = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    nodes = [node for node in made.graph.node if node.domain == "trt"]
    assert nodes
    for node in nodes:
        want = {
            "TRT_FP8QuantizeLinear": [E4M3],
            "TRT_FP4DynamicQuantize": [FP4, E4M3],
            "TRT_MXFP8DequantizeLinear": [TensorProto.BFLOAT16],
        }.get(node.op_type)
        scale = node.input[1]
        want = want or [constants.get(scale) or found[scale][0]]
        assert [found[name][0] for name in node.output] == want, node.name


def test_symbols_are_those_of_the_input() -> None:
    """ModelOpt's exporter gives each dimension of its operators' outputs a name of its own."""
    made = trt_model(
        """g (float[n,t,32] x, float s) => (float[n,t,32] y) <uint8[own_0,own_1,own_2] q> {
            q = trt.TRT_FP8QuantizeLinear(x, s)
            z = trt.TRT_FP8DequantizeLinear(q, s)
            y = Add(z, x)
        }"""
    )
    found = types(apply(made, TypeTrtOps()).model)
    assert found["q"] == (E4M3, ("n", "t", 32))
    assert found["z"] == (TensorProto.FLOAT, ("n", "t", 32))


def test_bfloat16_scales_give_bfloat16() -> None:
    made = trt_model(
        "g (float8e4m3fn[n] x) => (bfloat16[n] y) { z = trt.DequantizeLinear(x, s)  y = Relu(z) }",
        {"s": np.array(0.5, ml_dtypes.bfloat16)},
    )
    assert types(apply(made, TypeTrtOps()).model)["z"] == (TensorProto.BFLOAT16, ("n",))
