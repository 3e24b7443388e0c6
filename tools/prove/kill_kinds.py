"""What `tools.prove.kills` kills: five commands that take seconds, and what of their results is of the clock."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from diffc.artifact.folder import MANIFEST, RUN, file_sha256
from diffc.models.embedded import materialize

MODEL = "tiny-sd3"
"""The embedded model whose first blocks are left out, which takes half of the time."""
PROFILE = "batch=1,height=32,width=32,text=16"
OUTPUT = "made"
"""What the output of every kind is called, with an ending where it is a file."""


@dataclass(frozen=True)
class Kind:
    """`arguments` of diffc without the output; `results`: all names that it leaves in the folder of the output."""

    name: str
    arguments: Callable[[Path], list[str]]
    results: tuple[str, ...] = (OUTPUT,)

    def command(self, inputs: Path, folder: Path) -> list[str]:
        """The whole command line: inputs in one folder, the output in another."""
        return [*self.arguments(inputs), "-o", str(folder / self.results[0])]

    @property
    def replaces(self) -> bool:
        """Whether the command asks for --force to write over what is there; a calibration is written over anyway."""
        return self.name != "calibration"


def _compiled(*more: str) -> Callable[[Path], list[str]]:
    def arguments(inputs: Path) -> list[str]:
        given = [
            "--profile",
            PROFILE,
            "--prompts-file",
            str(inputs / "prompts.txt"),
            "--steps",
            "1",
            "--image-size",
            "32",
        ]
        return ["compile", str(inputs / MODEL), *given, *(text.format(inputs=inputs) for text in more)]

    return arguments


def _imported(inputs: Path) -> list[str]:
    return ["import", str(inputs / "exported.onnx")]


def _calibrated(inputs: Path) -> list[str]:
    given = ["--prompts-file", str(inputs / "prompts.txt"), "--steps", "2", "--image-size", "32"]
    return ["mix", str(inputs / MODEL), "--bits", "9", "--format", "fp8", "--format", "int8", *given]


KINDS = (
    Kind("fp8", _compiled("--format", "fp8", "--target", "trt-rtx", "--sm", "89")),
    Kind("cache", _compiled("--cache-plan", "{inputs}/plan.json")),
    Kind("lora", _compiled("--lora", "{inputs}/lora.safetensors=0.7")),
    Kind("import", _imported, (f"{OUTPUT}.onnx", f"{OUTPUT}.onnx_data")),
    Kind("calibration", _calibrated, (OUTPUT, f"{OUTPUT}.plan.json")),
)


def write_inputs(folder: Path) -> None:
    """The files that the kinds read: prompts, a LoRA for MODEL, and an ONNX file with its weights beside it."""
    folder.mkdir()
    _write_model(folder / MODEL)
    (folder / "prompts.txt").write_text("a red fox asleep in fresh snow\n", encoding="utf-8")
    random = np.random.default_rng(5)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    made = random.normal(size=(2, 4, 128)).astype(np.float32)
    factors = {"lora_A.weight": made[0], "lora_B.weight": np.ascontiguousarray(made[1].T)}
    save_file({f"{layer}.{name}": array for name, array in factors.items()}, folder / "lora.safetensors")
    entry = {"blocks": ["transformer_blocks.0"], "steps": {"every": 2}}
    plan = {"name": "first", "entries": [entry]}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    _write_exported(folder / "exported.onnx")


def _write_model(folder: Path) -> None:
    """MODEL with its first and its last block alone."""
    shutil.copytree(materialize(MODEL), folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    config = json.loads((folder / "transformer" / "config.json").read_text("utf-8"))
    last = config["num_layers"] - 1
    kept = {name: array for name, array in load_file(weights).items() if _block(name) in (None, 0, last)}
    save_file(
        {name.replace(f"_blocks.{last}.", "_blocks.1."): array for name, array in kept.items()}, weights
    )
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 2}), "utf-8")


def _block(name: str) -> int | None:
    """The number of the block that a weight is in; None for others."""
    _, found, rest = name.partition("transformer_blocks.")
    return int(rest.partition(".")[0]) if found else None


def _write_exported(path: Path) -> None:
    """A chain of quantized layers, as ModelOpt exports them, in opset 20."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(6)
    nodes, weights, value = [], [], "x"
    for index in range(12):
        array = random.normal(size=(512, 512)).astype(np.float32) / 23
        scales = np.abs(array).max() / 127
        weights += [
            numpy_helper.from_array(array, f"W{index}"),
            numpy_helper.from_array(np.array(scales, np.float32), f"s{index}"),
        ]
        weights += [numpy_helper.from_array(np.array(0, np.int8), f"z{index}")]
        own = [f"W{index}", f"s{index}", f"z{index}"]
        nodes += [
            helper.make_node("QuantizeLinear", own, [f"q{index}"], f"quantize{index}"),
            helper.make_node(
                "DequantizeLinear", [f"q{index}", *own[1:]], [f"w{index}"], f"dequantize{index}"
            ),
            helper.make_node("MatMul", [value, f"w{index}"], [f"y{index}"], f"product{index}"),
        ]
        value = f"y{index}"
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 512]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location="exported.onnx_data", size_threshold=64)


def contents(folder: Path) -> dict[str, str]:
    """What a result is compared by: the hash of every file by its name, of the manifest without what the clock says.

    Left out: seconds of the stages (records/run.json), the log of the engine's builder, which has seconds too, and in
    the manifest `seconds` of each engine and the hash and size of those logs.
    """
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(OUTPUT) and (path.suffix == ".log" or name.endswith(RUN)):
            found[name] = "of the clock"
        elif path.name == MANIFEST:
            found[name] = json.dumps(_timeless(json.loads(path.read_text("utf-8"))), sort_keys=True)
        else:
            found[name] = file_sha256(path)
    return found


def _timeless(manifest: dict[str, Any]) -> dict[str, Any]:
    logs = [name for name in manifest["files"] if name.endswith(".log")]
    files = {name: entry for name, entry in manifest["files"].items() if name not in logs}
    engines = [{k: v for k, v in engine.items() if k != "seconds"} for engine in manifest["engines"]]
    return {**manifest, "files": {**files, **dict.fromkeys(logs)}, "engines": engines}
