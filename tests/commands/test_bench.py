"""diffc bench: sides in turns, what fails, and what is written."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from diffc.cli.main import run as command
from diffc.commands.bench import output, run
from diffc.commands.bench.run import BenchRequest, Row
from diffc.commands.bench.sides import Setup
from diffc.commands.bench.worker import First, Memory, SideError, Taken, Worker
from diffc.errors import DiffcError
from diffc.models.spec import Shape
from tests import ROOT
from tests.cli_helpers import Capture, refusal
from tests.conftest import Cell, Cells

SMALL = "batch=2,height=64,width=64,text=8"
SHAPE = Shape(2, 64, 64, 8)


class Fake:
    """A worker that notes when it is called; "slow" takes longer, "broken" fails at its third call."""

    calls: list[str] = []  # noqa: RUF012  # of all workers, in order

    def __init__(self, name: str, setup: Setup):
        if setup.target == "none" and name == "compiled":
            raise SideError("does not start")
        self.name, self.count = name, 0

    def prepare(self, shape: Shape, seed: int, calls: int) -> First:
        del shape, seed, calls
        value = 1.01 if self.name == "compiled" else 1.0
        return First(0.5, np.full(4, value, np.float32))

    def measure(self) -> float:
        self.calls.append(self.name)
        self.count += 1
        if self.name == "compile" and self.count == 3:
            raise SideError("it broke")
        return {"compiled": 0.010, "eager": 0.040, "compile": 0.020}[self.name] + 0.001 * self.count

    def memory(self) -> Memory:
        return Memory(100 << 20, None)

    def close(self) -> None:
        self.calls.append(f"close {self.name}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(run, "Worker", Fake)
    monkeypatch.setattr(Fake, "calls", [])
    monkeypatch.setattr(run, "SETTLE", 0.0)
    return Fake


def measured(setup: Setup, repeat: int = 4) -> list[Row]:
    request = BenchRequest(Path("x"), repeat=repeat)
    with run.Sides() as sides:
        for name in ("compiled", "eager", "compile"):
            sides.load(name, setup)
        return sides.measure(SHAPE, request, lambda done, total: None)


def setup(target: str | None = None) -> Setup:
    return Setup(Path("x"), "m", "float32", "cpu", target)


def test_sides_take_turns(fake: type[Fake]) -> None:
    rows = measured(setup(), repeat=2)
    turns = [name for name in fake.calls if not name.startswith("close")]
    assert turns == ["compiled", "eager", "compile"] * 2
    assert [row.side for row in rows] == ["compiled", "eager", "compile"]
    assert [len(row.seconds) for row in rows] == [2, 2, 2]


@pytest.mark.usefixtures("fake")
def test_figures_are_those_of_the_calls() -> None:
    compiled, eager, _ = measured(setup(), repeat=2)
    assert compiled.seconds == pytest.approx((0.011, 0.012))
    assert compiled.quartiles == pytest.approx((0.01125, 0.0115, 0.01175))
    assert compiled.rel_l2 == pytest.approx(0.01, rel=1e-5)
    assert eager.rel_l2 is None


def test_a_side_that_fails_says_why_and_the_others_go_on(fake: type[Fake]) -> None:
    compiled, eager, broken = measured(setup("none"))
    assert (compiled.reason, compiled.seconds) == ("does not start", ())
    assert (broken.reason, broken.seconds) == ("it broke", ())
    assert len(eager.seconds) == 4
    assert fake.calls.count("compile") == 3
    text = shown([compiled, eager, broken])
    assert "compiled was not measured: does not start" in text
    assert "torch.compile was not measured: it broke" in text


def test_a_side_that_was_asked_for_and_failed_is_an_error(fake: type[Fake]) -> None:
    rows = measured(setup())
    assert fake.calls
    run.require_measured(rows, ())
    run.require_measured(rows, ("eager",))
    with pytest.raises(DiffcError, match=r"compile was not measured at batch 2.*: it broke"):
        run.require_measured(rows, ("eager", "compile"))
    with pytest.raises(DiffcError, match="compiled was not measured"):
        run.require_measured(measured(setup("none")), ())


def shown(rows: list[Row]) -> str:
    console = Console(width=120, record=True)
    for table in output.tables(rows):
        console.print(table)
    return console.export_text()


@pytest.mark.usefixtures("fake")
def test_the_table_compares_with_eager() -> None:
    text = shown(measured(setup(), repeat=1))
    assert "batch 2, 64x64 px, 8 tokens" in text
    assert "3.73 x" in text  # 41 / 11 ms
    assert "182" in text  # images a second: 2 / 11 ms


@pytest.fixture(scope="module")
def cell(compiled: Cells) -> Cell:
    return compiled("tiny-sd3", "fp8")


def test_the_memory_of_a_side_is_its_own() -> None:
    """Two sides on one device of 100: what the other takes while this one waits is not counted, nor given back."""
    device = {"free": 100}
    mine, other = Taken(lambda: device["free"]), Taken(lambda: device["free"])
    for side, takes in ((mine, 30), (other, 50), (mine, 5), (other, -20), (mine, -10)):
        with side.counted():
            device["free"] -= takes
    assert (mine.peak, other.peak) == (35, 50)


def test_the_command_measures_and_writes(cell: Cell, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["bench", str(cell.folder), "--shape", SMALL, "--repeat", "3", "--against", "eager"]
    assert command([*arguments, "--json", str(tmp_path / "b.json")]) == 0
    assert "images/s" in capsys.readouterr().out
    content: dict[str, Any] = json.loads((tmp_path / "b.json").read_text())
    compiled, eager = content["rows"]
    assert (compiled["side"], eager["side"]) == ("compiled", "eager")
    assert len(compiled["seconds"]) == 3
    assert 0 < compiled["least"] <= compiled["median"] <= max(compiled["seconds"])
    assert compiled["images_per_second"] == pytest.approx(2 / compiled["median"])
    assert 50 << 20 < eager["memory"]["rss"] < 8 << 30
    assert 1e-4 < compiled["rel_l2"] < 0.3, "FP8 differs from the unquantized model, and not by much"
    assert content["machine"]["torch_threads"] >= 1
    assert list(tmp_path.iterdir()) == [tmp_path / "b.json"]


def test_a_compiled_side_that_cannot_load_is_a_reason(cell: Cell) -> None:
    with pytest.raises(SideError, match="not"):
        Worker("compiled", Setup(cell.folder, "tiny-sd3", "float16", "cpu", "ort-cuda"))
    with pytest.raises(SideError, match="CUDA graphs are there for"):
        Worker("compiled", Setup(cell.folder, "tiny-sd3", "float16", "cpu", None, cuda_graph=True))


def test_the_flag_for_cuda_graphs_arrives(cell: Cell, capsys: Capture) -> None:
    arguments = ["bench", str(cell.folder), "--shape", SMALL, "--against", "none", "--cuda-graph"]
    assert command([*arguments, "--device", "cpu", "--repeat", "1"]) == 1
    printed = capsys.readouterr()
    assert "CUDA graphs are there for" in " ".join(printed.out.split())
    assert "compiled was not measured" in printed.err


@pytest.mark.parametrize(
    ("more", "said", "code"),
    [
        (["--against", "tensorflow"], "unknown side", 2),
        (["--shape", "height=65"], "use a multiple of", 2),
        (["--json", "nowhere/b.json"], "does not exist", 1),
        (["--plot", "plot.txt"], "plot", 2),
    ],
)
def test_what_cannot_be_measured_is_refused(
    cell: Cell, more: list[str], said: str, code: int, capsys: Capture
) -> None:
    started = time.monotonic()
    assert said in refusal(["bench", str(cell.folder), *more], cell.folder, capsys, code)
    assert time.monotonic() - started < 20, "before anything is loaded"


def test_a_plot_without_matplotlib_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DiffcError, match="matplotlib") as error:
        output.check_plot(Path("a.png"))
    assert error.value.fix.startswith('pip install "matplotlib')
    output.check_plot(None)


@pytest.mark.usefixtures("fake")
def test_the_plot_is_a_picture_with_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = measured(setup(), repeat=2)
    output.save_plot(rows, "title", tmp_path / "b.svg")
    text = (tmp_path / "b.svg").read_text()
    assert "<svg" in text
    assert text.count("<path") > 10
    output.save_plot([row for row in rows if row.side == "eager"], "title", tmp_path / "one.svg")
    assert (tmp_path / "one.svg").stat().st_size < (tmp_path / "b.svg").stat().st_size


def test_an_imported_artifact_has_no_backbone_to_measure(cell: Cell) -> None:
    manifest = {**cell.artifact.manifest, "format": "as imported"}
    other = type(cell.artifact)(cell.folder, manifest)
    with pytest.raises(DiffcError, match="compiled from an ONNX file"):
        run.plan(other, BenchRequest(cell.folder))


def test_the_usual_shape_is_the_profile_s(cell: Cell) -> None:
    found, shapes = run.plan(cell.artifact, BenchRequest(cell.folder))
    assert shapes == [Shape(**cell.artifact.manifest["profile"]["optimum"])]
    assert found.dtype == cell.artifact.manifest["dtype"]


@pytest.mark.parametrize("document", ["validation.md", pytest.param("bench.md", marks=pytest.mark.slow)])
def test_commands_of_the_documents_run(
    document: str, cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    lines = re.findall(r"^diffc (?:validate|bench) .*$", text, re.MULTILINE)
    assert lines
    for line in lines:
        arguments = shlex.split(line.replace("build/digits-sd3-fp8", str(cell.folder)))[1:]
        assert command(arguments) == 0, line
