"""passes/targets/ort/lora_slots.py: branches beside products, in ONNX Runtime: empty, set, and of several ranks."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from passes.targets.ort.lora_slots import with_lora_slots
from passes.weights.recipe import Array
from tests.passes.graph_helpers import model, typed
from tests.passes.weights.lora.files import arrays

GRAPHS = {
    "plain": "y = MatMul (x, W)",
    "quantized": """q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) w = DequantizeLinear (W8, s)
        y = MatMul (d, w)""",
    "scaled": """m = Mul (x, c) q = QuantizeLinear (m, s) d = DequantizeLinear (q, s) w = DequantizeLinear (W8, s)
        y = MatMul (d, w)""",
    "Gemm": "y = Gemm <transB=1> (x, V)",
}


def graph(text: str) -> onnx.ModelProto:
    values: dict[str, Array] = {
        "W": arrays({"w": (6, 8)}, 1)["w"], "V": arrays({"w": (8, 6)}, 1)["w"], "s": np.float32(0.05),
        "W8": np.arange(48, dtype=np.int8).reshape(6, 8), "c": np.full(6, 2, np.float32),
    }  # fmt: skip
    body = f"g (float[batch,6] x) => (float[batch,8] y) {{ {text} }}"
    made = model(body, {name: value for name, value in values.items() if name in re.findall(r"\w+", text)})
    for number, node in enumerate(made.graph.node):
        place = "a.to_q.input_quantizer" if node.op_type in ("Mul", "QuantizeLinear") else "a.to_q"
        node.name = f"{place}/{node.op_type}_{number}"
    return typed(made)


def run(made: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, feeds)[0]
    return result


@pytest.mark.parametrize("case", GRAPHS)
def test_empty_slots_change_no_bit_and_set_ones_add_the_product_of_the_unrounded_input(case: str) -> None:
    made = graph(GRAPHS[case])
    slotted, slots = with_lora_slots(made)
    onnx.checker.check_model(slotted)
    assert [(s.module, s.inputs, s.outputs, s.dtype) for s in slots.values()] == [("a.to_q", 6, 8, 1)]
    x = arrays({"x": (3, 6)}, 5)["x"]
    before = run(made, {"x": x})
    assert np.array_equal(run(slotted, {"x": x}), before)
    slot = slots["a.to_q"]
    for rank in (1, 5):
        lora = arrays({slot.a: (6, rank), slot.b: (rank, 8)}, rank)
        wanted = before + (x.astype(np.float64) @ lora[slot.a]) @ lora[slot.b]
        found = run(slotted, {"x": x, **lora})
        assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
    assert np.array_equal(run(slotted, {"x": x}), before)


def test_products_of_computed_tensors_have_no_slot() -> None:
    made = graph("t = Transpose <perm=[1,0]> (x) i = MatMul (t, x) u = MatMul (x, i) y = MatMul (u, W)")
    slotted, slots = with_lora_slots(made)
    assert len(slots) == 1
    assert len(slotted.graph.input) == 3
