"""Networks with quantizers, built node by node or at random, for the tests of the passes that move them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from passes import Pipeline
from passes.canonical.fuse_qdq import FuseQdq
from passes.weights.sources import np_dtype
from tests.passes.graph_helpers import apply, check_same, ops

INT8, FP8, FLOAT = TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT
TYPES = pytest.mark.parametrize("kind", [INT8, FP8], ids=["int8", "fp8"])


@dataclass
class Net:
    """A graph under construction: `q` and `dq` share scales by name, `add` takes any node."""

    kind: int = INT8
    wide: int = FLOAT
    shape: tuple[int, ...] = (2, 6, 8)
    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)

    def constant(self, name: str, value: Any) -> str:
        self.tensors.setdefault(name, np.asarray(value))
        return name

    def scale(self, name: str, value: Any) -> list[str]:
        """A scale and its zero point, per tensor or (a list) per channel."""
        scale = np.asarray(value, np_dtype(self.wide))
        return [
            self.constant(name, scale),
            self.constant(f"{name}_zero", np.zeros(scale.shape, np_dtype(self.kind))),
        ]

    def add(self, op: str, inputs: list[str], out: str | None = None, count: int = 0, **attrs: Any) -> Any:
        name = out or f"t{len(self.nodes)}"
        outs = [f"{name}.{i}" for i in range(count)] or [name]
        self.nodes.append(helper.make_node(op, inputs, outs, f"n{len(self.nodes)}_{op}", **attrs))
        return outs if count else name

    def q(self, x: str, scale: str = "s", value: Any = 0.03, **attrs: Any) -> str:
        return self.add("QuantizeLinear", [x, *self.scale(scale, value)], **attrs)

    def dq(self, x: str, scale: str = "s", value: Any = 0.03, **attrs: Any) -> str:
        return self.add("DequantizeLinear", [x, *self.scale(scale, value)], **attrs)

    def pair(self, x: str, scale: str = "s", value: Any = 0.03, **attrs: Any) -> str:
        return self.dq(self.q(x, scale, value, **attrs), scale, value, **attrs)

    def matmul(self, x: str, rows: int, out: str) -> str:
        w = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np_dtype(self.wide))
        self.outputs[out] = self.wide
        return self.add("MatMul", [x, self.constant(f"w{rows}", w)], out)

    def reshape(self, x: str, shape: list[int]) -> str:
        return self.add("Reshape", [x, self.constant(f"shape{shape}", np.array(shape, np.int64))])

    def cut(self, x: str, start: int, end: int, axis: int) -> str:
        parts = [self.constant(f"i{v}", np.array([v], np.int64)) for v in (start, end, axis)]
        return self.add("Slice", [x, *parts])

    def model(self) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", self.wide, ["batch", *self.shape[1:]])],
            [helper.make_tensor_value_info(name, kind, None) for name, kind in self.outputs.items()],
            [numpy_helper.from_array(value, name) for name, value in self.tensors.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)

    def feeds(self, seed: int = 0) -> dict[str, Any]:
        x = np.random.default_rng(seed).standard_normal(self.shape) * 1.5
        return {"x": x.astype(np_dtype(self.wide))}


def fuse(net: Net) -> ModelProto:
    """The fused model, after the comparison of all outputs, bit for bit."""
    made = net.model()
    result = apply(made, FuseQdq())
    check_same(made, result.model, net.feeds())
    return result.model


def counts(made: ModelProto) -> dict[str, int]:
    return dict(Counter(ops(made)))


def behind(made: ModelProto, name: str) -> list[str]:
    """The operators in front of a tensor, nearest first, along first inputs."""
    makers = {out: node for node in made.graph.node for out in node.output}
    chain = []
    while name in makers:
        chain.append(makers[name].op_type)
        name = makers[name].input[0]
    return chain


def reasons(made: ModelProto) -> list[str]:
    result = Pipeline([FuseQdq()]).run(made)
    return [refusal.reason for refusal in result.records[0].refusals]


def every_move(kind: int, wide: int = FLOAT) -> Net:
    """Quantized data that two read, so that only DQ moves, and every kind of move to a product."""
    net = Net(kind, wide, shape=(2, 8, 8))
    x = net.pair(net.add("Relu", ["x"]))
    net.outputs["wide"] = net.wide
    net.add("Abs", [x], "wide")

    def ints(*values: int) -> str:
        return net.constant(f"ints{values}", np.array(values, np.int64))

    apart = net.add("Unsqueeze", [x, ints(1)])
    moved = [
        net.add("Transpose", [x], perm=[0, 2, 1]),
        net.reshape(x, [-1, 16]),
        net.add("Flatten", [x], axis=1),
        net.add("Identity", [x]),
        net.add("Squeeze", [apart, ints(1)]),
        net.cut(x, 0, 3, 1),
        *net.add("Split", [x], count=2, axis=1, num_outputs=2),
        net.add("Gather", [x, ints(3, 1)], axis=1),
        net.add("Tile", [x, ints(1, 2, 1)]),
        net.add("Expand", [apart, ints(1, 3, 1, 1)]),
        net.add("Concat", [x, x], axis=1),
    ]
    for index, tensor in enumerate(moved):
        rows = {1: 16, 2: 64}.get(index, 8)
        net.matmul(tensor, rows, f"y{index}")
    return net


def random_net(seed: int) -> Net:
    """Quantizers with two scales, moves of data, sums and products, wired at random."""
    rng = np.random.default_rng(seed)
    net = Net(INT8 if seed % 2 else FP8, shape=(2, 4, 8))
    pool: list[tuple[str, tuple[int, ...]]] = [("x", (2, 4, 8))]
    channels = {size: rng.uniform(0.01, 0.05, size) for size in (2, 4, 8, 16, 32, 64)}
    for _ in range(int(rng.integers(8, 22))):
        x, shape = pool[rng.integers(max(0, len(pool) - 4), len(pool))]
        pool.append(random_step(net, rng, x, shape, pool, channels))
    for index, (x, shape) in enumerate(pool[-3:]):
        net.matmul(x, shape[-1], f"y{index}")
    return net


def random_step(net: Net, rng: Any, x: str, shape: tuple[int, ...], pool: Any, channels: Any) -> Any:
    kind = rng.integers(0, 10)
    if kind < 4:
        scale = ("a", 0.03) if rng.random() < 0.8 else ("b", 0.05)
        axis = int(rng.integers(0, len(shape)))
        if rng.random() < 0.2 and shape[axis] in channels:
            return net.pair(x, f"c{shape[axis]}", channels[shape[axis]], axis=axis), shape
        return net.pair(x, *scale), shape
    if kind == 4:
        perm = [int(i) for i in rng.permutation(len(shape))]
        return net.add("Transpose", [x], perm=perm), tuple(shape[i] for i in perm)
    if kind == 5:
        shape = (
            [(8, 8), (2, 4, 8), (2, 2, 2, 8), (4, 16)][rng.integers(4)]
            if np.prod(shape) == 64
            else shape[::-1]
        )
        return net.reshape(x, list(shape)), shape
    if kind == 6:
        axis = int(rng.integers(0, len(shape)))
        end = max(1, shape[axis] // 2)
        return net.cut(x, 0, end, axis), (*shape[:axis], end, *shape[axis + 1 :])
    if kind == 7:
        same = [name for name, other in pool if other == shape]
        axis = int(rng.integers(0, len(shape)))
        joined = net.add("Concat", [x, same[rng.integers(len(same))]], axis=axis)
        return joined, (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
    if kind == 8:
        axis = int(rng.integers(0, len(shape)))
        if shape[axis] % 2 == 0:
            halves = net.add("Split", [x], count=2, axis=axis, num_outputs=2)
            half = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
            pool.append((halves[0], half))
            return halves[1], half
    return net.add("Abs" if rng.random() < 0.5 else "Neg", [x]), shape


class TestEngine:
    @pytest.mark.parametrize(("kind", "sms", "left"), [(INT8, (86, 120), 0), (FP8, (89, 120), 7)])
    def test_tensorrt_builds_every_move_that_the_pass_makes(self, tmp_path, kind, sms, left):
        """FP8 of which TensorRT builds no move stays wide there: the pass refuses `left` moves."""
        pytest.importorskip("tensorrt_rtx")
        from diffc.backends.profile import Profile
        from tests.networks import build

        fuse(every_move(kind))
        result = apply(every_move(kind, TensorProto.FLOAT16).model(), FuseQdq())
        assert len(result.records[0].refusals) == left
        profile = Profile.of_shapes({"x": (1, 8, 8)}, {"x": (2, 8, 8)}, {"x": (4, 8, 8)})
        assert build(tmp_path, result.model, sms, profiles=(profile,)).nbytes > 0
