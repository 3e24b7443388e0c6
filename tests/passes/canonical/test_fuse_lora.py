"""fuse-lora: the layouts that weights have in graphs, names of nodes and of weights, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from passes import Pipeline
from passes.base import PassError
from passes.canonical.fuse_lora import FuseLora
from passes.storage import load, materialize, save
from passes.weights.recipe import Array
from tests.passes.graph_helpers import model, run_ort, typed
from tests.passes.weights.lora.files import arrays, factors, written

SAME = 1e-6
GRAPHS = {
    "MatMul, by the node": ("y = MatMul (x, w)", "w", (6, 8), "a.to_q/MatMul", "w"),
    "MatMul, legacy path": ("y = MatMul (x, w)", "w", (6, 8), "/a/to_q/MatMul", "onnx::MatMul_7"),
    "MatMul, by the weight": ("y = MatMul (x, w)", "w", (6, 8), "node_3", "a.to_q.weight"),
    "MatMul of a transpose": (
        "t = Transpose <perm=[1,0]> (w) y = MatMul (x, t)",
        "w",
        (8, 6),
        "a.to_q/MatMul",
        "w",
    ),
    "Gemm": ("y = Gemm <transB=1> (x, w)", "w", (8, 6), "a.to_q/Gemm", "w"),
    "Gemm, not transposed": ("y = Gemm (x, w)", "w", (6, 8), "a.to_q/Gemm", "w"),
}


def graph(
    text: str, shape: tuple[int, ...], name: str, weight: str, dtype: type = np.float32
) -> onnx.ModelProto:
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    made = model(
        f"g ({kind}[3,6] x) => ({kind}[3,8] y) {{ {text} }}", {"w": arrays({"w": shape}, 2, dtype)["w"]}
    )
    made.graph.node[-1].name = name
    made.graph.initializer[0].name = weight
    for node in made.graph.node:
        node.name = node.name or "turn"
        node.input[:] = [weight if i == "w" else i for i in node.input]
    return typed(made)


@pytest.mark.parametrize("case", GRAPHS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_in_every_layout(case: str, dtype: type, tmp_path: Path) -> None:
    text, _, shape, name, weight = GRAPHS[case]
    before = graph(text, shape, name, weight, dtype)
    lora = factors("lora_unet_a_to_q", 8, 6)
    file = written(tmp_path / "a.safetensors", lora)
    step = Pipeline.parse(f"fuse-lora{{file={file},weight=0.5}}")
    after = step.run(before)
    assert after.changed == 1
    x = arrays({"x": (3, 6)}, 9, dtype)["x"]
    stored = onnx.numpy_helper.to_array(before.graph.initializer[0]).astype(np.float64)
    rows = stored if shape == (8, 6) else stored.T
    up, down = (array.astype(np.float64) for array in lora.values())
    wanted = (rows + 0.5 * up @ down).astype(dtype).astype(np.float64)
    found = run_ort(materialize(after.model), {"x": x})[0].astype(np.float64)
    limit = SAME if dtype is np.float32 else 1e-3  # float16 products
    assert np.linalg.norm(found - x @ wanted.T) <= limit * np.linalg.norm(found)
    assert step.run(after.model).changed == 0  # the file is in the weight already


def test_convolutions_biases_and_norms(tmp_path: Path) -> None:
    values = arrays(
        {"a.conv.weight": (8, 4, 3, 3), "a.conv.bias": (8,), "a.norm.weight": (5,), "a.norm.bias": (5,)}, 2
    )
    text = """g (float[1,4,5,5] x) => (float[1,8,5,5] y) {
        c = Conv <pads=[1,1,1,1]> (x, W, B) y = LayerNormalization <axis=-1> (c, S, H) }"""
    made = model(text, dict(zip("WBSH", values.values(), strict=True)))
    named = dict(zip("WBSH", values, strict=True))
    for tensor in made.graph.initializer:
        tensor.name = named[tensor.name]
    for i, node in enumerate(made.graph.node):
        node.name, node.input[:] = f"n{i}", [named.get(name, name) for name in node.input]
    tensors = arrays({"up": (8, 2, 1, 1), "down": (2, 4, 3, 3), "diff_b": (8,), "w": (5,)}, 3)
    file = written(
        tmp_path / "a.safetensors",
        {"a.conv.lora_up.weight": tensors["up"], "a.conv.lora_down.weight": tensors["down"],
         "a.conv.diff_b": tensors["diff_b"], "a.norm.w_norm": tensors["w"]},
    )  # fmt: skip
    result = Pipeline((FuseLora(str(file)),)).run(typed(made))
    assert result.changed == 3
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in materialize(result.model).graph.initializer}
    new = {name.removesuffix("_2"): array for name, array in stored.items()}
    delta = np.einsum("or,rikl->oikl", tensors["up"][..., 0, 0], tensors["down"])
    for name, added in (
        ("a.conv.weight", delta),
        ("a.conv.bias", tensors["diff_b"]),
        ("a.norm.weight", tensors["w"]),
    ):
        candidates = [array for key, array in stored.items() if key.startswith(name)]
        assert any(np.allclose(array, values[name] + added, atol=1e-6) for array in candidates), (
            name,
            list(new),
        )


def test_a_file_saved_and_loaded_again_takes_another_lora(tmp_path: Path) -> None:
    text, _, shape, name, weight = GRAPHS["Gemm"]
    save(graph(text, shape, name, weight), tmp_path / "in.onnx")
    files = [written(tmp_path / f"{n}.safetensors", factors("a.to_q", 8, 6, seed=n)) for n in (1, 2)]
    both = Pipeline(tuple(FuseLora(str(file)) for file in files)).run(load(tmp_path / "in.onnx"))
    assert both.changed == 2


def _quantized() -> onnx.ModelProto:
    values: dict[str, Array] = {"w": np.ones((6, 8), np.int8), "s": np.float32(0.1)}
    made = model(
        "g (float[3,6] x) => (float[3,8] y) { d = DequantizeLinear (w, s) y = MatMul (x, d) }", values
    )
    made.graph.node[0].name, made.graph.node[1].name = "a.to_q/DequantizeLinear", "a.to_q/MatMul"
    return typed(made)


def test_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", factors("a.to_q", 8, 6))
    with pytest.raises(PassError, match="quantized already"):
        Pipeline((FuseLora(str(file)),)).run(_quantized())
    left = Pipeline((FuseLora(str(file), partial=True),)).run(_quantized())
    assert left.changed == 0
    assert "quantized" in left.records[0].refusals[0].reason


def test_layers_that_the_graph_lacks_are_told(tmp_path: Path) -> None:
    text, _, shape, name, weight = GRAPHS["Gemm"]
    file = written(tmp_path / "a.safetensors", factors("a.to_q", 8, 6) | factors("a.to_k", 8, 6))
    with pytest.raises(PassError, match=r"a\.to_k.*no such layer"):
        Pipeline((FuseLora(str(file)),)).run(graph(text, shape, name, weight))
    with pytest.raises(PassError, match="PATTERN:WEIGHT"):
        Pipeline((FuseLora(str(file), layers=("x",)),)).run(graph(text, shape, name, weight))
    half = Pipeline((FuseLora(str(file), layers=("*to_q:0.5",), partial=True),))
    assert half.run(graph(text, shape, name, weight)).changed == 1
    assert Pipeline((FuseLora(),)).run(graph(text, shape, name, weight)).changed == 0
