"""diffc validate: what is run again, what a damaged artifact says, the first module that is off, and the script."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from diffc.artifact.folder import file_sha256
from diffc.cli.main import run
from diffc.commands.validate import Validated, ValidateRequest, validate_artifact
from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import MismatchError
from diffc.validate.cuts import COMPUTED, extract, module_values, nodes_computing
from diffc.validate.modules import ModuleReport
from diffc.validate.reports import UNROUNDED
from passes import Pipeline
from passes.presets import target_passes
from tests.cli_helpers import Capture, refusal
from tests.conftest import Cell, Cells

SMALL = "batch=1,height=64,width=64,text=8"
Damage = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def fp8(compiled: Cells) -> Cell:
    return compiled("tiny-sd3", "fp8")


def damaged(cell: Cell, folder: Path, damage: Damage) -> Path:
    """A copy of the artifact whose graph was changed, and whose manifest does not tell."""
    copy = shutil.copytree(cell.folder, folder / "damaged")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    damage(model)
    onnx.save(model, copy / "model.onnx")
    rehash(copy, "model.onnx")
    return Path(copy)


def rehash(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    manifest["files"][name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))


def scaled(name: str, factor: float) -> Damage:
    def damage(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), name))

    return damage


def without_approximation(model: onnx.ModelProto) -> None:
    """The feed-forward of block 1 activates with another Gelu: off by 1e-3 at most."""
    (node,) = (n for n in model.graph.node if n.name == "transformer_blocks.1.ff.net.0/Gelu")
    (attribute,) = node.attribute
    assert attribute.s == b"tanh"
    attribute.s = b"none"


def crossed(model: onnx.ModelProto) -> None:
    """Attention of block 1 takes its keys for its queries."""
    nodes = {n.name: n for n in model.graph.node}
    query, key = (nodes[f"transformer_blocks.1.attn.to_{x}/MatMul"] for x in "qk")
    query.input[1], key.input[1] = key.input[1], query.input[1]


def validate(folder: Path, **changed: object) -> Validated:
    request = replace(ValidateRequest(folder, shapes=(SMALL,)), **changed)  # type: ignore[arg-type]
    return validate_artifact(request, bisect=True)


def first(result: Validated) -> str:
    """The module that is the first to be off, in the first arithmetic that shows anything."""
    return next(r for r in result.modules["model.onnx"] if r.wrong).wrong[0].value.module


def test_an_artifact_that_was_just_made_is_within_all_limits(fp8: Cell, capsys: Capture) -> None:
    arguments = ["validate", str(fp8.folder), "--shape", SMALL, "--seed", "3", "--seed", "4", "--bisect"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "ort against torch" in out
    assert out.count("all within their limit") == 2
    assert "FAILED" not in out


def test_a_changed_file_is_named_before_anything_runs(fp8: Cell, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(fp8.folder, tmp_path / "copy")
    with (copy / "model.onnx_data").open("r+b") as file:
        file.seek(70_000)
        byte = file.read(1)
        file.seek(70_000)
        file.write(bytes([byte[0] ^ 1]))
    error = refusal(["validate", str(copy)], copy, capsys)
    assert "model.onnx_data was changed after the compile" in error


@pytest.mark.parametrize(
    ("damage", "module"),
    [
        (
            scaled("transformer_blocks.1.ff.net.2.weight_quantizer.scale", 1.1),
            "transformer_blocks.1.ff.net.2",
        ),
        (
            scaled("transformer_blocks.1.ff.net.2.input_quantizer.scale", 1.1),
            "transformer_blocks.1.ff.net.2.input_quantizer",
        ),
        (scaled("transformer_blocks.1.attn.to_k.bias", 1.02), "transformer_blocks.1.attn.to_k"),
        (without_approximation, "transformer_blocks.1.ff.net.0"),
        (crossed, "transformer_blocks.1.attn.to_q"),
    ],
    ids=["weight scale", "activation scale", "bias", "operator", "wires"],
)
def test_bisect_names_the_module_that_was_damaged(
    fp8: Cell, tmp_path: Path, damage: Damage, module: str
) -> None:
    result = validate(damaged(fp8, tmp_path, damage))
    assert first(result) == module
    names = {w.value.module for r in result.modules["model.onnx"] for w in r.wrong}
    assert len(names) <= 2, "what comes behind is fed the right values"
    with pytest.raises(MismatchError, match=re.escape(f"{module} of the compiled model.onnx differs")):
        result.require_match()


def test_a_damaged_artifact_is_exit_code_3(fp8: Cell, tmp_path: Path, capsys: Capture) -> None:
    copy = damaged(fp8, tmp_path, scaled("transformer_blocks.1.ff.net.2.weight_quantizer.scale", 1.1))
    assert run(["validate", str(copy), "--shape", SMALL]) == 3
    said = capsys.readouterr()
    assert "FAILED" in said.out
    assert "output 'out_hidden_states'" in said.err
    assert "--bisect" in said.err
    assert run(["validate", str(copy), "--shape", SMALL, "--tolerance", "0.9"]) == 0


def test_findings_say_which_nodes_are_in_the_piece(fp8: Cell, tmp_path: Path) -> None:
    result = validate(damaged(fp8, tmp_path, scaled("transformer_blocks.1.attn.to_k.bias", 1.5)))
    found = result.modules["model.onnx"][0]
    assert isinstance(found, ModuleReport)
    assert found.arithmetic == UNROUNDED
    (wrong,) = found.wrong
    assert wrong.value.op == "Add"
    assert wrong.nodes[-1] == "transformer_blocks.1.attn.to_k/Add"
    assert "transformer_blocks.1.attn.to_k/MatMul" in wrong.nodes
    assert wrong.error > wrong.limit


def test_another_artifact_or_file_can_be_the_reference(fp8: Cell, tmp_path: Path) -> None:
    copy = damaged(fp8, tmp_path, scaled("transformer_blocks.1.ff.net.2.weight_quantizer.scale", 1.1))
    good = validate(fp8.folder, against=str(fp8.folder / "model.onnx"))
    assert all(r.passed and r.rows[0].rel_l2 == 0 for r in good.reports if r.arithmetic != "float16")
    bad = validate(copy, against=str(fp8.folder))
    assert first(bad) == "transformer_blocks.1.ff.net.2"
    assert not any(r.passed for r in bad.reports if r.arithmetic == UNROUNDED)


def test_what_came_from_a_file_is_held_against_the_file(fp8: Cell, tmp_path: Path, capsys: Capture) -> None:
    source, out = fp8.folder / "model.onnx", tmp_path / "out"
    compile_model(CompileRequest(str(source), out))
    assert validate_artifact(ValidateRequest(out)).against == "ort"
    request = ValidateRequest(out, against=str(source), shapes=("batch=3,text=5",))
    good = validate_artifact(request, bisect=True)
    good.require_match()
    assert str(good.reports[0].shape).startswith("batch 3, ")
    assert good.modules["model.onnx"][0].modules > 90
    error = refusal(["validate", str(out), "--against", "torch"], out, capsys)
    assert "compiled from an ONNX file" in error
    assert "--against model.onnx" in error


def test_onnx_runtime_as_users_run_it(fp8: Cell) -> None:
    reports = validate_artifact(ValidateRequest(fp8.folder, against="ort", shapes=(SMALL,))).reports
    assert [r.arithmetic for r in reports] == ["ort, float16"]
    assert reports[0].passed
    assert reports[0].rows[0].rel_l2 != 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--shape", "height=63"], "use a multiple of"),
        (["--shape", "depth=2"], "unknown axis"),
        (["--shape", "batch=1:2:4"], "write one number"),
        (["--against", "nowhere"], "give --against torch, ort"),
        (["--target", "trt"], "unknown target"),
        (["--target", "ort-cuda"], "was not compiled for ort-cuda"),
        (["--model", "nowhere"], "unknown model"),
        (["--model", "tiny-flux"], "is another model than"),
        (["--model", "tiny-sd35"], "is another model than"),
    ],
)
def test_what_cannot_be_validated_is_refused(fp8: Cell, more: list[str], said: str, capsys: Capture) -> None:
    assert said in refusal(["validate", str(fp8.folder), *more], fp8.folder, capsys)


def test_the_script_repeats_it_without_diffc(fp8: Cell, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "script"
    assert run(["validate", str(fp8.folder), "--shape", SMALL, "--script", str(folder)]) == 0
    lines = (folder / "run.sh").read_text().splitlines()
    (unrounded,) = (line for line in lines if "model-unrounded.onnx" in line)
    assert "diffc" not in "".join(p.read_text() for p in folder.glob("*.py")).replace("diffc validate", "")
    assert polygraphy(unrounded, folder).returncode == 0
    (outputs,) = folder.glob("*unrounded*-reference.json")
    (other,) = folder.glob("*float32*-reference.json")
    shutil.copy(other, outputs)  # the rounded outputs: off by several per cent
    failed = polygraphy(unrounded, folder)
    assert failed.returncode != 0
    assert "relative L2 error" in failed.stdout
    error = refusal(["validate", str(fp8.folder), "--script", str(folder)], folder, capsys)
    assert "not empty" in error


def polygraphy(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one line of run.sh, and so that diffc cannot be imported."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    (folder / "diffc.py").write_text("raise ImportError('without diffc')")
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
    return subprocess.run(
        ["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_run_sh_is_a_shell_script_that_stops_at_the_first_failure(fp8: Cell, tmp_path: Path) -> None:
    folder = tmp_path / "script"
    validate_artifact(ValidateRequest(fp8.folder, shapes=(SMALL,)), script=folder)
    text = (folder / "run.sh").read_text()
    assert text.startswith("#!/bin/sh\nset -e\n")
    assert text.count("polygraphy run ") == 3
    assert subprocess.run(["sh", "-n", "run.sh"], cwd=folder, check=False).returncode == 0


def small_graph() -> onnx.ModelProto:
    """x -> a/Relu -> b/Exp -> c/Add(with a's) -> y."""
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["a/Relu_out"], "a/Relu"),
        onnx.helper.make_node("Exp", ["a/Relu_out"], ["b/Exp_out"], "b/Exp"),
        onnx.helper.make_node("Add", ["b/Exp_out", "a/Relu_out"], ["y"], "c/Add"),
    ]
    value = onnx.helper.make_tensor_value_info
    x, y = (value(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)


def renamed(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The nodes and what they give called so, the graph's output excepted."""
    new = {node.output[0]: f"{name}_out" for node, name in zip(model.graph.node, names, strict=True)}
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
        for field in (node.input, node.output):
            field[:] = [tensor if tensor == "y" else new.get(tensor, tensor) for tensor in field]
    return model


def test_a_module_that_ends_with_one_inside_it_has_no_point() -> None:
    model = renamed(small_graph(), "up/Resize", "up.conv/Exp", "up.conv.bias/Add")
    assert [p.module for p in module_values(model)] == ["up.conv.bias"]


def test_a_value_that_another_modules_node_gives_is_still_its_modules() -> None:
    model = renamed(small_graph(), "a/Relu", "a.inner/Exp", "c/Add")
    assert [p.module for p in module_values(model)] == ["a.inner", "c"]
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "c/Exp_out"  # its bias went into c, a norm
    assert [(p.module, p.tensor) for p in module_values(model)] == [("c", "y")]
    model.graph.node[2].output.append("a/Add_out")  # and c gives the sum behind it, too
    assert [(p.module, p.node) for p in module_values(model)] == [("a", "c/Add"), ("c", "c/Add")]


def test_bisect_finds_nothing_in_a_unet_that_was_just_made(compiled: Cells) -> None:
    result = validate(compiled("tiny-sdxl", "fp8").folder)
    (reports,) = result.modules.values()
    assert not any(r.wrong for r in reports)
    assert all(r.modules > 50 for r in reports)


def test_bisect_finds_nothing_in_fused_operators(fp8: Cell, tmp_path: Path) -> None:
    """What fusing takes from a module, its bias or norm, is no longer compared with what the module gives."""

    def fused(model: onnx.ModelProto) -> None:
        model.CopyFrom(Pipeline(target_passes("ort-cuda")).run(model).model)
        assert {"FastGelu", "MultiHeadAttention"} <= {node.op_type for node in model.graph.node}

    result = validate(damaged(fp8, tmp_path, fused))
    (reports,) = result.modules.values()
    assert not any(r.wrong for r in reports)
    assert all(r.modules > 60 for r in reports)


def test_a_cut_graph_computes_each_piece_from_what_it_is_fed() -> None:
    model = small_graph()
    points = module_values(model)
    assert [p.module for p in points] == ["a", "b", "c"]
    part = extract(model, [p.tensor for p in points], {p.tensor: 1 for p in points})
    assert [v.name for v in part.graph.input] == ["x", "a/Relu_out", "b/Exp_out"]
    session = onnx.reference.ReferenceEvaluator(part)
    x, a, b = (np.asarray(v, np.float32) for v in ([-1.0, 2.0], [0.5, 0.25], [3.0, 4.0]))
    out = dict(
        zip(
            [v.name for v in part.graph.output],
            session.run(None, {"x": x, "a/Relu_out": a, "b/Exp_out": b}),
            strict=True,
        )
    )
    np.testing.assert_allclose(out["a/Relu_out" + COMPUTED], [0, 2])
    np.testing.assert_allclose(out["b/Exp_out" + COMPUTED], np.exp(a), rtol=1e-6)
    np.testing.assert_allclose(out["y" + COMPUTED], a + b)


def test_a_piece_reaches_back_to_the_known_tensors() -> None:
    model = small_graph()
    assert nodes_computing(model, "y", set()) == ["a/Relu", "b/Exp", "c/Add"]
    assert nodes_computing(model, "y", {"a/Relu_out", "y"}) == ["b/Exp", "c/Add"]
    assert [v.name for v in extract(model, ["b/Exp_out"], {}).graph.input] == ["x"]
