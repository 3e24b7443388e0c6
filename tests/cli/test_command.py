"""What every command shares: -h, groups, examples, choices and defaults in the help, and the common options."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from diffc.cli import choices
from diffc.cli.command import SHARED
from diffc.cli.main import app, run
from diffc.cli.terminal import Verbosity, opened
from diffc.quantize.formats import FORMATS
from tests.cli_helpers import Capture

ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, *path: str) -> list[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    found = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += commands(command, *path, name)
        else:
            found.append(((*path, name), command))
    return found


COMMANDS = commands()
NAMES = [" ".join(path) for path, _ in COMMANDS]


def help_of(path: tuple[str, ...], capsys: Capture) -> str:
    capsys.readouterr()
    assert run([*path, "-h"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=NAMES)
def test_help_names_every_default_choice_and_shared_option(
    path: tuple[str, ...], command: Any, capsys: Capture
) -> None:
    text = help_of(path, capsys)
    assert max(map(len, text.partition("Examples:")[0].splitlines())) <= 80
    assert not [name for name in choices.TABLES if f"{{{name}}}" in text], "choices that were not filled in"
    flat = " ".join(text.split())
    for param in command.params:
        if param.param_type_name == "option":
            assert all(name in text for name in param.opts)
            shown = param.show_default if isinstance(param.show_default, str) else param.default
            if shown not in (None, False, True, "") and param.name not in ("install_completion",):
                assert re.search(rf"\[default: \(?{re.escape(str(shown))}", flat), (param.name, shown)
    assert {"-q", "-v", "--log-file", "--json", "--debug", "-h"} <= set(re.findall(r"--?[\w-]+", text))
    assert text.count("Every command:") == 1


def test_compile_groups_its_options_and_lists_the_formats(capsys: Capture) -> None:
    text = help_of(("compile",), capsys)
    sections = re.findall(r"^(\S[^\n]*):$", text, re.MULTILINE)
    assert sections[:2] == ["Arguments", "Options"]
    assert len(sections) > 6
    assert ", ".join(FORMATS) in " ".join(text.split())


def test_examples_can_be_typed(capsys: Capture) -> None:
    """Every example names a command and options that exist: each is parsed, none is run."""
    seen = 0
    for own, command in COMMANDS:
        lines = re.findall(r"^  (diffc .*)$", command.epilog or "", re.MULTILINE)
        assert not lines or any(shlex.split(line)[1 : 1 + len(own)] == list(own) for line in lines), own
        for line in lines:  # some show the command that comes next
            words = shlex.split(line)[1:]
            path, named = max(
                (c for c in COMMANDS if words[: len(c[0])] == list(c[0])), key=lambda c: len(c[0])
            )
            with named.make_context(path[-1], words[len(path) :]):
                seen += 1
    assert seen > 15
    assert "Examples:" in help_of(("bench",), capsys)


def test_the_list_of_commands_has_groups(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert [s for s in ("Make:", "Check and use:", "Look up:") if s not in text] == []
    assert all(name.split()[0] in text for name in NAMES)


def in_a_process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_python_dash_m() -> None:
    for module in ("diffc", "diffc.cli"):
        done = in_a_process("-m", module, "-V")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("diffc ")


def test_a_shell_completes_commands_and_values() -> None:
    def completed(words: str) -> list[str]:
        count = str(len(words.split(" ")) - 1)
        done = in_a_process(
            "-m", "diffc", _DIFFC_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count
        )
        return done.stdout.split()

    assert completed("diffc comp") == ["compile"]
    assert completed("diffc compile --format nv") == [name for name in FORMATS if name.startswith("nv")]
    assert completed("diffc compile digits-s") == [n for n in choices.models() if n.startswith("digits-s")]


def test_json_to_a_file_and_to_standard_output(tmp_path: Path, capsys: Capture) -> None:
    assert run(["formats", "--json", str(tmp_path / "f.json")]) == 0
    assert "int8" in capsys.readouterr().out
    assert run(["formats", "--json", "-"]) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert rows == json.loads((tmp_path / "f.json").read_text())
    assert [row["name"] for row in rows] == list(FORMATS)
    assert "int8" in printed.err
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_json_has_no_infinite_numbers(capsys: Capture) -> None:
    """Such as the PSNR of equal pictures, which no strict reader of JSON would take."""
    with opened(Verbosity(json="-")) as terminal:
        terminal.result({"psnr": float("inf"), "ssim": 1.0, "place": Path("a"), "name": "\u00e9"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"psnr": None, "ssim": 1.0, "place": "a", "name": "\u00e9"}
    assert printed.isascii()


def test_json_says_why_a_command_failed(capsys: Capture, tmp_path: Path) -> None:
    assert run(["inspect", str(tmp_path / "none"), "--json", "-"]) == 1
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert "is not an artifact, and not a model" in content["error"]
    assert content["error"] in printed.err.replace("\n  | ", "\n")


def test_a_log_file_holds_stages_and_what_libraries_say(tmp_path: Path, capsys: Capture) -> None:
    root = logging.getLogger()
    before = list(root.handlers), logging.getLogger("diffc").level
    log = tmp_path / "doctor.log"
    run(["doctor", "-q", "--log-file", str(log)])
    printed = capsys.readouterr()
    assert "look at the libraries" not in printed.err
    assert re.search(r"INFO diffc.progress: look at the libraries \(\d", log.read_text())
    assert (list(root.handlers), logging.getLogger("diffc").level) == before


def test_files_that_cannot_be_written_are_refused_first(tmp_path: Path, capsys: Capture) -> None:
    for option in ("--json", "--log-file"):
        assert run(["formats", option, str(tmp_path / "none" / "x")]) == 1
        printed = capsys.readouterr()
        assert "does not exist" in printed.err
        assert printed.out == ""


def test_shared_options_are_in_no_command_of_their_own() -> None:
    for path, command in COMMANDS:
        function = inspect.unwrap(command.callback)
        assert not set(inspect.signature(function).parameters) & set(SHARED), path
