"""Every command in the documents runs, and every name in them exists."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from diffc.cli.main import run
from tests import ROOT
from tests.passes.weights.lora.files import factors, written
from tools import run as demo

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SESSIONS = [
    [line for line in text.splitlines() if line.startswith("diffc ")] for kind, text in BLOCKS if not kind
]
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines() if line]
QUICK = ["--steps", "1"]
VERBS = (
    "fold|remove|split|decompose|widen|smooth|fuse|share|rewrite|emulate|normalize|match|type|merge|join|lift"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with an in.onnx, as the working directory."""
    monkeypatch.chdir(tmp_path)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), "in.onnx")
    return tmp_path


def test_readme_commands_are_of_known_kinds() -> None:
    for line in COMMANDS:
        assert line.startswith(("python3 tools/run.py ", "pip install ", "diffc ")), line
    assert sum(line.startswith("python3 tools/run.py ") for line in COMMANDS) == 2


@pytest.mark.compiles
@pytest.mark.parametrize("lines", [lines for lines in SESSIONS if lines], ids=lambda lines: lines[0])
def test_diffc_commands_run(lines: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in lines:
        arguments = shlex.split(line)[1:]
        if "trt-rtx" in arguments:
            pytest.importorskip("tensorrt_rtx")
        assert run([*arguments, *(QUICK if arguments[0] == "compile" else [])]) == 0
        assert capsys.readouterr().out
        if "-o" in arguments:
            assert (here / arguments[arguments.index("-o") + 1]).exists()


@pytest.mark.compiles
def test_the_demo_runs_and_says_where_its_result_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    moved = {str(demo.OUTPUT): str(here / "out"), str(demo.PICTURE): str(here / "seven.png")}
    assert run([*(moved.get(part, part) for part in demo.DEMO[2:]), *QUICK]) == 0
    assert "Compiled" in capsys.readouterr().out
    assert run([moved.get(part, part) for part in demo.PAINT[2:]]) == 0
    assert "3 of 3 right" in capsys.readouterr().out
    with Image.open(here / "seven.png") as picture:
        assert min(picture.size) > 300
    for place in (demo.OUTPUT, demo.PICTURE):
        assert place.relative_to(ROOT).as_posix() in README
    assert {p.name for p in (here / "out" / "engines").glob("*.engine")} == {
        "trt-rtx-sm89.engine",
        "trt-rtx-sm120.engine",
    }


@pytest.mark.compiles
@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "python"])
def test_python_examples_run(text: str, here: Path) -> None:
    before = set(here.iterdir())
    exec(compile(text, "README.md", "exec"), {})
    assert set(here.iterdir()) - before


LORA = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.compiles
def test_the_commands_about_loras_run_in_their_order(here: Path) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", LORA, re.MULTILINE | re.DOTALL)
    file = written(here / "style.safetensors", factors("a.b", 4, 4))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "a.b/MatMul")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), "in.onnx")
    assert file.is_file()
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "lora.md", "exec"), {})
        for line in text.splitlines() if not kind else ():
            arguments = shlex.split(line)[1:]
            assert run([*arguments, *(QUICK if arguments[0] == "compile" else [])]) == 0
            assert (here / arguments[arguments.index("-o") + 1]).exists()


def test_the_install_command_names_real_extras() -> None:
    (line,) = (line for line in COMMANDS if line.startswith("pip install"))
    (extras,) = re.findall(r'"\.\[(.*)\]"', line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert (ROOT / "tools" / "constraints.txt").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_files_and_passes_named_in_documents_exist(document: Path) -> None:
    from passes import all_passes

    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:diffc|passes|tools|docs|tests)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:models|backends|quantize|frontend|validate)/[\w/.]+)`", text):
        assert (ROOT / "diffc" / name).exists(), name
    for name in re.findall(rf"(?<![-\w.])((?:{VERBS})-[a-z0-9]+(?:-[a-z0-9]+)?)\b", text):
        assert name in all_passes(), name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (document.parent / target).exists(), target


def test_the_examples_for_contributors_are_files_that_tests_install() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    examples = re.findall(r"^<!-- (\S+) -->\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 6
    for name, code in examples:
        assert name.startswith("tests/plugin_package/")
        assert (ROOT / name).read_text(encoding="utf-8") == code, f"copy {name} into CONTRIBUTING.md"
    assert re.findall(r"^```\n(python3 .*)\n", text, re.MULTILINE) == ["python3 tools/run.py test --fast"]
