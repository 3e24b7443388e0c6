"""Files that a command is told to write, and figures that are there whole or not at all."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from diffc.cli.main import run
from diffc.errors import DiffcError
from diffc.output_files import check_output_file, save_figure


class Figure:
    """What matplotlib's figures have of a method."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.format = fails, ""

    def savefig(self, file, dpi, format):  # type: ignore[no-untyped-def]
        assert dpi == 150
        self.format = format
        file.write(b"half")
        if self.fails:
            raise OSError("the disk is full")
        file.write(b" and half")


def test_files_and_free_places_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    check_output_file(tmp_path / "there")
    check_output_file(tmp_path / "free")


def test_what_is_no_file_is_left(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="not a file: it is left as it is"):
        check_output_file(tmp_path)
    with pytest.raises(DiffcError, match=r"cannot write to|not a file"):
        check_output_file(tmp_path / ("n" * 5000))


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_link_is_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("there", "folder", "circle"):
        (tmp_path / f"to {name}").symlink_to(name if name != "circle" else "to circle")
    check_output_file(tmp_path / "to there")
    for name in ("to folder", "to circle"):
        with pytest.raises(DiffcError, match=name):
            check_output_file(tmp_path / name)


def test_a_figure_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    made = Figure()
    save_figure(made, tmp_path / "plot.PNG")
    assert ((tmp_path / "plot.PNG").read_bytes(), made.format) == (b"half and half", "png")
    with pytest.raises(OSError, match="the disk is full"):
        save_figure(Figure(fails=True), tmp_path / "other.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.PNG"]


def test_no_command_makes_the_folder_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """generate made it, cache search failed after its work, opt refused at once (F26): all refuse at once."""
    file = tmp_path / "no" / "such" / "file"
    commands = (
        ["generate", "art", "--prompt", "x", "-o", f"{file}.png"],
        ["opt", "m.onnx", "-p", "remove-unused", "-o", f"{file}.onnx"],
        ["import", "m.onnx", "-o", f"{file}.onnx"],
        ["cache", "search", "tiny-sd3", "-o", f"{file}.yaml"],
        ["mix", "tiny-sd3", "--bits", "8", "-o", str(file)],
    )
    for command in commands:
        assert run(command) == 1, command
        assert re.search(r"folder[\s\S]*Fix: make it", capsys.readouterr().err), command
    assert not (tmp_path / "no").exists()
