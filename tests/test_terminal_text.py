"""What comes from a file is shown on the terminal as it is written, and says nothing to it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from diffc.cli import comparisons, listings, tables
from diffc.cli.main import run
from diffc.cli.terminal import Terminal
from diffc.commands.bench import output
from diffc.commands.bench.run import Row
from diffc.commands.doctor import Finding
from diffc.errors import DiffcError
from diffc.models.spec import Shape
from diffc.progress_bar import ProgressBar
from diffc.terminal_text import LIMIT, Screen, block, cell, error_text, line, show_traceback, shown, styled
from diffc.validate.compare import OutputComparison
from diffc.validate.reports import ShapeReport
from passes import PassError
from passes.base import Refusal
from passes.pipeline import PassRecord, PipelineResult
from tests.cli_helpers import Capture

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.exe\udc80[/red][bold]x\r:warning:"
HARMLESS = "\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\u202egnp.exe\\udc80[/red][bold]x\\r:warning:"
FORGED = "A\nerror: fake\n  Fix: rm -rf ~"


@pytest.mark.parametrize(
    "code", [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x202E, 0x2028, 0x2066, 0xD800, 0xE0041]
)
def test_no_character_that_does_something_is_shown(code: int) -> None:
    for text in (shown(chr(code)), line(chr(code)), block(f"a{chr(code)}b"), str(styled(chr(code)))):
        assert all(c == "\n" or c.isprintable() for c in text)
        text.encode("utf-8")
    assert chr(code) not in line(chr(code))


def test_other_text_stays() -> None:
    text = "Grüße, 模型 ✓ 🎨 [1, 2] a\\b"
    assert shown(text) == line(text) == block(text) == str(styled(text)) == str(cell(text)) == text


def test_long_texts_lose_their_middle() -> None:
    text = shown("a" * 10**6 + "end")
    assert len(text) < LIMIT + 100
    assert text.startswith("aaa")
    assert text.endswith("end")
    assert f"({10**6 + 3 - LIMIT} characters left out)" in text


def test_no_value_forges_a_line() -> None:
    assert line(FORGED) == "A\\nerror: fake\\n  Fix: rm -rf ~"
    assert block(FORGED) == "A\n  | error: fake\n  |   Fix: rm -rf ~"
    error = DiffcError(FORGED, fix=FORGED)
    starts = [text[:4] for text in error_text(error).splitlines()]
    assert starts == ["erro", "  | ", "  | ", "  Fi", "  | ", "  | "]
    assert error_text(DiffcError("a", fix="b")) == "error: a\n  Fix: b"
    assert error_text(DiffcError("a")) == error_text(PassError("a")) == "error: a"
    assert error_text(PassError(FORGED)).splitlines()[1] == "  | error: fake"


def on_a_terminal() -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    return Screen(file=file, force_terminal=True, width=300, color_system="truecolor"), file


def plain(file: io.StringIO) -> str:
    """What was written, without the styles that diffc itself chose."""
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def test_a_screen_shows_everything_as_it_is() -> None:
    screen, file = on_a_terminal()
    table = Table("[red]head[/red]", title=EVIL, caption=EVIL)
    table.add_row(EVIL)
    for thing in (EVIL, styled(EVIL, (EVIL, "red")), cell(EVIL), table):
        screen.print(thing)
    text = plain(file)
    assert text.count(HARMLESS) == 7
    assert "[red]head[/red]" in text
    assert "\x1b" not in text
    assert "\x1b[31m" in file.getvalue()


@pytest.mark.parametrize(
    ("columns", "settings", "folds"),
    [(None, {}, False), ("60", {}, True), ("nonsense", {}, False), (None, {"width": 60}, True)],
)
def test_a_table_in_a_file_is_folded_only_where_somebody_says_so(
    columns: str | None, settings: dict[str, int], folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe and the log of a CI have no width, whatever terminal the process was started from."""
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    file = io.StringIO()
    table = Table("pass", "changed", "check")
    row = (
        "normalize-qdq",
        "124",
        "outputs within 1e-6 of those before, at 3 shapes and 2 seeds, and of the reference",
    )
    table.add_row(*row)
    Screen(file=file, **settings).print(table)
    lines = [text for text in file.getvalue().splitlines() if all(cell in text for cell in row)]
    assert len(lines) == (0 if folds else 1)


def test_notes_and_stages() -> None:
    screen, file = on_a_terminal()
    terminal = ProgressBar(screen)
    terminal.note(f"{EVIL}\nerror: fake")
    with terminal.stage(f"{EVIL}\nerror: fake"):
        pass
    assert "\nerror: fake" not in plain(file)
    assert plain(file).count(f"{HARMLESS}\\nerror: fake") >= 2
    assert "\x1b]0" not in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()
    assert isinstance(ProgressBar().console, Screen)
    assert isinstance(Terminal().console, Screen)


def consoles() -> list[tuple[Console, io.StringIO]]:
    """Ours, and rich's own, which reads markup."""
    file = io.StringIO()
    return [on_a_terminal(), (Console(file=file, force_terminal=True, width=300), file)]


def check(file: io.StringIO) -> None:
    text = plain(file)
    assert "\\x1b[2J" in text
    assert "[/red][bold]x" in text
    assert "\x1b[2J" not in file.getvalue()
    assert "\x1b]0" not in file.getvalue()
    assert "\nerror: fake" not in text


@pytest.mark.parametrize("number", [0, 1])
def test_reports(number: int) -> None:
    name = f"{EVIL}\nerror: fake"
    manifest = {
        "format": EVIL,
        "files": {f"model{name}.onnx": {"bytes": 1}},
        "model": {"name": name},
        "engines": [],
        "inputs": [{"name": name, "dims": [EVIL]}],
        "profile": [],
    }
    artifact = SimpleNamespace(manifest=manifest, folder=Path(f"run{EVIL}"))
    row = OutputComparison(name, False, 0.1, 0.2, 0.3, 0.4, (1,), reason=name)
    shape = ShapeReport(Shape(1, 8, 8, 1), EVIL, [row], {}, {}, {}, model=EVIL)
    record = PassRecord(EVIL, 1, 0.0, 1, 1, (name,), (Refusal(name, name),), EVIL)
    result: Any = SimpleNamespace(artifact=artifact, validation=())
    checked: Any = SimpleNamespace(artifact=artifact, validation=[shape])
    finding = Finding(EVIL, False, EVIL, EVIL)
    model = onnx.ModelProto()
    for print_it in (
        lambda terminal: tables.compiled(result, 1.0, terminal),
        lambda terminal: tables.compiled(checked, 1.0, terminal),
        lambda terminal: tables.optimized(PipelineResult(model, (record,)), Path(EVIL), terminal),
        lambda terminal: comparisons.compared([shape], terminal, EVIL),
        lambda terminal: listings.examined([finding], terminal),
        lambda terminal: terminal.print(*output.tables([Row("eager", Shape(1, 8, 8, 1), reason=EVIL)])),
    ):
        terminal = Terminal()
        terminal.console, file = consoles()[number]
        print_it(terminal)
        check(file)


def model(folder: Path, op: str) -> str:
    value = helper.make_tensor_value_info
    x, y = value("x", TensorProto.FLOAT, ["n"]), value("y", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], "m")], "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    (folder / "in.onnx").write_bytes(made.SerializeToString())
    return str(folder / "in.onnx")


def test_an_error_shows_names_of_a_file_harmlessly(tmp_path: Path, capsys: Capture) -> None:
    source = model(tmp_path, "Nope\x1b[2J\u202e\nerror: fake\n  Fix: rm")
    assert run(["import", source, "-o", str(tmp_path / "o.onnx")]) == 1
    said = capsys.readouterr().err
    assert "Nope\\x1b[2J\\u202e\n  | error: fake\n  |   Fix: rm" in said
    assert said.count("\n  Fix: ") == 1


@pytest.mark.parametrize("name", ["run[/red]", "run[bold]", "a:warning:b"])
def test_an_output_is_called_what_it_is_called(name: str, tmp_path: Path, capsys: Capture) -> None:
    """F17: this ended in a MarkupError after the work."""
    path = tmp_path / f"{name}.onnx"  # the first has a folder in it
    path.parent.mkdir(exist_ok=True)
    assert run(["opt", model(tmp_path, "Relu"), "-p", "remove-unused", "-o", str(path)]) == 0
    assert path.is_file()
    assert f"Wrote{path}" in capsys.readouterr().out.replace("\n", "").replace(" ", "")


def test_an_argument_is_shown_harmlessly(capsys: Capture) -> None:
    assert run(["nosuch\x1b[2J"]) == 2
    assert "nosuch\\x1b[2J" in capsys.readouterr().err


def test_a_traceback_of_ours_is_harmless_too(capsys: Capture) -> None:
    try:
        raise KeyError("\x1b[2J")
    except KeyError:
        show_traceback(*sys.exc_info())  # type: ignore[arg-type]  # there is one
    try:
        raise RuntimeError("\x1b[2J")
    except RuntimeError:
        show_traceback(*sys.exc_info())  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "RuntimeError: \\x1b[2J" in said
    assert "Traceback (most recent call last)" in said
