"""Files of `tools.prove.worst_cases`: for each door the one that costs the most if nobody looks first."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper, parser

_SD3 = {"_class_name": "SD3Transformer2DModel", "num_layers": 1_000_000_000, "sample_size": 8}


@dataclass(frozen=True)
class Case:
    """A command whose arguments have `{at}` for the folder that `write` fills, and the exit code that is right."""

    name: str
    write: Callable[[Path], None]
    arguments: tuple[str, ...]
    code: int = 1


def _text(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return write


def _binary(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None  # type: ignore[func-returns-value]


def _onnx(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        made = parser.parse_model(text)
        (folder / "m.onnx").write_bytes(made.SerializeToString())

    return write


def _einsum(folder: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("Einsum", ["x"], ["y"], "e", equation="......")
    graph = helper.make_graph([node], "g", [value("x", 1, ["n"])], [value("y", 1, None)])
    _save(graph, folder)


def _range(folder: Path) -> None:
    value = helper.make_tensor_value_info
    ends = [
        helper.make_tensor(name, TensorProto.INT64, [], [n])
        for name, n in zip("abc", (0, 1 << 36, 1), strict=True)
    ]
    nodes = [
        helper.make_node("Range", ["a", "b", "c"], ["r"], "r"),
        helper.make_node("Reshape", ["x", "r"], ["y"], "y"),
    ]
    _save(helper.make_graph(nodes, "g", [value("x", 1, ["n"])], [value("y", 1, None)], ends), folder)


def _functions(folder: Path) -> None:
    """Forty functions that call the next one twice."""
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]

    def function(number: int) -> onnx.FunctionProto:
        last = number == 40
        domain, op = ("", "Neg") if last else ("f", f"f{number + 1}")
        nodes = [
            helper.make_node(op, ["a"], ["b"], domain=domain),
            helper.make_node(op, ["b"], ["c"], domain=domain),
        ]
        return helper.make_function("f", f"f{number}", ["a"], ["c"], nodes, sets)

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("f0", ["x"], ["y"], "call", domain="f")],
        "g",
        [value("x", 1, ["n"])],
        [value("y", 1, ["n"])],
    )
    made = helper.make_model(
        graph, opset_imports=sets, functions=[function(n) for n in range(41)], ir_version=10
    )
    (folder / "m.onnx").write_bytes(made.SerializeToString())


def _save(graph: onnx.GraphProto, folder: Path) -> None:
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "m.onnx").write_bytes(made.SerializeToString())


_LOOP = """<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y)
<int64 count = {4611686018427387904}, bool on = {1}> {
    y = Loop (count, on, x) <body = b (int64 i, bool go, float[2] held) => (bool next, float[2] sum) {
        next = Identity (go)
        sum = Tanh (held)
    }>
}"""


def _unfolding_pickle(folder: Path) -> None:
    """A pickle of a kilobyte whose lists hold each other twice: 2^100 items."""
    data = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(100)) + b"."
    with zipfile.ZipFile(folder / "m.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")


_HEADER = json.dumps(
    {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}
).encode()
_ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
_PLAN = f"a0: &a0 [1, 1, 1]\n{_ALIASES}name: *a9\nentries: *a9\n"
_TINY = ("compile", "tiny-sd3", "-o", "{at}/out", "--profile", "batch=1,height=32,width=32,text=16")

CASES = (
    Case(
        "a valid `.onnx`",
        _onnx('<ir_version: 10, opset_import: ["": 21]> g (float[n] x) => (float[n] y) { y = Neg (x) }'),
        ("opt", "{at}/m.onnx", "-p", "remove-unused", "-o", "{at}/o.onnx"),
        0,
    ),
    Case(
        "`Einsum` with the equation `......`",
        _einsum,
        ("opt", "{at}/m.onnx", "-p", "remove-unused", "-o", "{at}/o.onnx"),
    ),
    Case(
        "40 functions that call the next one twice",
        _functions,
        ("opt", "{at}/m.onnx", "-p", "remove-unused", "-o", "{at}/o.onnx"),
    ),
    Case("`Range` to 2^36", _range, ("import", "{at}/m.onnx", "-o", "{at}/o.onnx"), 0),
    Case("a `Loop` without an end", _onnx(_LOOP), ("import", "{at}/m.onnx", "-o", "{at}/o.onnx"), 0),
    Case("a manifest of 200,000 `[`", _text("manifest.json", "[" * 200_000), ("inspect", "{at}")),
    Case("config.json of a billion layers", _text("config.json", json.dumps(_SD3)), ("inspect", "{at}")),
    Case(
        "model_index.json nested 100,000 deep",
        _text("model_index.json", '{"a":' * 100_000),
        ("inspect", "{at}"),
    ),
    Case(
        "a checkpoint nested 100,000 deep",
        _text("ck/checkpoint.json", '{"a":' * 100_000),
        (*_TINY, "--format", "fp8", "--from-checkpoint", "{at}/ck"),
    ),
    Case(
        "safetensors: a tensor of 2^62 bytes",
        _binary("m.safetensors", struct.pack("<Q", len(_HEADER)) + _HEADER),
        ("inspect", "{at}/m.safetensors"),
    ),
    Case(
        "GGUF: 2^62 tensors",
        _binary("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 1 << 62) + bytes(999)),
        ("inspect", "{at}/m.gguf"),
    ),
    Case("`torch.save`: lists that unfold to 2^100", _unfolding_pickle, ("inspect", "{at}/m.ckpt")),
    Case(
        "LoRA: a tensor of 2^62 bytes",
        _binary("l.safetensors", struct.pack("<Q", len(_HEADER)) + _HEADER),
        (*_TINY, "--lora", "{at}/l.safetensors"),
    ),
    Case(
        "cache plan: aliases nested 9 deep",
        _text("plan.yaml", _PLAN),
        (*_TINY, "--cache-plan", "{at}/plan.yaml"),
    ),
    Case(
        "option: inputs of terabytes",
        lambda folder: None,
        ("compile", "tiny-sd3", "-o", "{at}/out", "--profile", "batch=1000000,height=8192,width=8192"),
        2,
    ),
)
"""In the order of the doors in docs/reliability.md."""
