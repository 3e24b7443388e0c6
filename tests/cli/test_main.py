"""The command line: what it prints and writes; interruptions leave nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest

from diffc.cli.main import run
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.models.sources.locate import locate
from diffc.quantize.formats import FORMATS
from tests.cli_helpers import RTX, Capture, compile_arguments, listing, refusal
from tests.conftest import HAS_RTX

needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed")


@pytest.fixture
def quick(traced: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles of tiny-sd3 take the trace that was made."""
    import diffc.compile.spine

    monkeypatch.setattr(diffc.compile.spine, "trace", lambda *_: traced)


@pytest.mark.usefixtures("quick")
def test_compile_says_what_it_did_and_force_replaces_an_artifact(tmp_path: Path, capsys: Capture) -> None:
    assert run(compile_arguments(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "Compiled tiny-sd3 to none" in printed.out
    assert "model.onnx_data" in printed.out
    assert "of the original's" in printed.out
    assert "Next: diffc generate" in printed.out
    assert re.search(r"\[2/4\] rewrite the graph \.\.\.\n[\s\S]*\[4/4\] validate model.onnx", printed.err)
    first = (tmp_path / "out" / "manifest.json").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert "exists" in refusal(compile_arguments(tmp_path), tmp_path, capsys)
    (tmp_path / "out" / "leftover").write_text("of the old one")
    assert run(compile_arguments(tmp_path, "--force", "--seed", "3")) == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() != first
    assert not (tmp_path / "out" / "leftover").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.usefixtures("quick")
def test_a_failed_compile_keeps_the_artifact_that_was_there(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffc.compile.spine

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(diffc.compile.spine, "validate", full)
    error = refusal(compile_arguments(tmp_path, "--force"), tmp_path, capsys)
    assert "no space left on the disk" in error


@pytest.mark.usefixtures("quick")
def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert "no room on" in refusal(compile_arguments(tmp_path), tmp_path, capsys)


@pytest.mark.usefixtures("quick")
def test_a_disk_that_fills_while_writing_is_one_clear_error(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left on" in refusal(compile_arguments(tmp_path), tmp_path, capsys)


@pytest.mark.usefixtures("quick")
def test_a_dump_folder_that_is_a_file_is_one_clear_error(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("x")
    arguments = compile_arguments(tmp_path, "--dump", str(tmp_path / "file"))
    assert str(tmp_path / "file") in refusal(arguments, tmp_path, capsys)


def test_two_compiles_into_one_folder(tmp_path: Path, capsys: Capture) -> None:
    from diffc.artifact.folder import staging

    with staging(tmp_path / "out", force=False):
        assert "another diffc is writing" in refusal(compile_arguments(tmp_path), tmp_path, capsys)


def workers(parent: psutil.Process) -> list[psutil.Process]:
    """The engine builders among the children of a process."""
    found = []
    for child in parent.children(recursive=True):
        try:
            if "diffc.backends.tensorrt.worker" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


@needs_rtx
@pytest.mark.usefixtures("quick")
def test_a_crash_of_the_engine_builder_is_one_clear_error(tmp_path: Path, capsys: Capture) -> None:
    def kill_the_first() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for process in workers(psutil.Process()):
                process.kill()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=kill_the_first)
    thread.start()
    error = refusal(compile_arguments(tmp_path, *RTX, "--sm", "89"), tmp_path, capsys)
    thread.join()
    assert re.search(r"the builder process for .* (was killed|ended|crashed)", error), error


# A compile in a process of its own that takes the trace from a file: argv is the file and the arguments.
# Who runs the tests in the background has SIGINT ignored, and children inherit that: a terminal's shell does not.
DRIVER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import onnx
import diffc.compile.spine
from diffc.cli.main import run
traced = onnx.load(sys.argv[1], load_external_data=False)
diffc.compile.spine.trace = lambda *_: traced
sys.exit(run(sys.argv[2:]))
"""


def start(traced: onnx.ModelProto, folder: Path, *more: str) -> subprocess.Popen[str]:
    """The compile into `folder`, under work, started; in a process group of its own."""
    (folder / "work").mkdir(exist_ok=True)
    (folder / "traced.onnx").write_bytes(traced.SerializeToString())
    command = [sys.executable, "-c", DRIVER, str(folder / "traced.onnx")]
    return subprocess.Popen(
        [*command, *compile_arguments(folder / "work", *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(happened: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to whole consoles only")
@pytest.mark.parametrize("stage", ["passes", pytest.param("engine", marks=[needs_rtx, pytest.mark.slow])])
def test_ctrl_c_exits_130_and_leaves_nothing(stage: str, traced: onnx.ModelProto, tmp_path: Path) -> None:
    more = (*RTX, "--sm", "89") if stage == "engine" else ()
    process = start(traced, tmp_path, *more)
    parent, work = psutil.Process(process.pid), tmp_path / "work"
    children: list[psutil.Process] = []

    def reached() -> bool:
        children[:] = workers(parent)
        return bool(children) if stage == "engine" else (work / ".out.partial").is_dir()

    wait_for(reached, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the builder, too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "Stopped. Nothing unfinished was written."
    assert not list(work.iterdir())
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.slow
def test_a_killed_compile_leaves_nothing_under_its_name_and_can_be_run_again(
    traced: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import diffc.compile.spine

    process, work = start(traced, tmp_path), tmp_path / "work"
    wait_for(lambda: list(work.glob(".out.partial/model.onnx*")), process)
    process.kill()
    process.communicate()
    assert not (work / "out").exists()
    assert (work / ".out.partial").exists()
    monkeypatch.setattr(diffc.compile.spine, "trace", lambda *_: traced)
    assert run(compile_arguments(work)) == 0, capsys.readouterr().err
    assert {p.name for p in work.iterdir()} == {"out"}
    assert "manifest.json" in listing(work / "out")


def in_a_process(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "diffc"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


DRY_RUN = "compile tiny-sd3 --format fp8 --cache-plan blocks --dry-run -o out"


@pytest.mark.parametrize("line", ["--help", "compile --help", "formats", DRY_RUN])
def test_what_only_looks_imports_nothing_heavy(line: str, tmp_path: Path) -> None:
    code = "import os, sys; os.chdir(sys.argv[1]); from diffc.cli.main import run; done = run(sys.argv[2:])"
    done = in_a_process(
        str(tmp_path), *line.split(), code=f"{code}; print(sorted(sys.modules)); sys.exit(done)"
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout[done.stdout.rindex("[") :]
    heavy = "torch onnxruntime tensorrt tensorrt_rtx modelopt diffusers transformers polygraphy scipy"
    # The table of formats says with ONNX's types what is stored; the list of commands needs no table.
    heavy += " onnx numpy rich" if line == "--help" else ""
    assert not [name for name in heavy.split() if f"'{name}'" in loaded]


def test_a_real_command_prints_its_error_and_debug_its_traceback(tmp_path: Path) -> None:
    arguments = compile_arguments(tmp_path, "--format", "fp9")
    plain = in_a_process(*arguments)
    assert (plain.returncode, plain.stdout) == (2, "")
    first = plain.stderr.splitlines()[0]
    assert first == f"error: unknown format 'fp9'. Known: {', '.join(FORMATS)}. Did you mean fp8?"
    assert "Traceback" not in plain.stderr
    debug = in_a_process("--debug", *arguments)
    assert debug.returncode == 1
    assert debug.stderr.startswith("Traceback")
    assert "UsageError: unknown format 'fp9'" in debug.stderr


def test_lists(capsys: Capture) -> None:
    import diffc

    for arguments, expected in (
        (["--version"], [f"diffc {diffc.__version__}"]),
        (["models", "list"], list(EMBEDDED)),
        (["formats"], [*FORMATS, "SM89"]),
        (["passes"], ["fold-weight-qdq", "decompose-attention", "fold-constants"]),
    ):
        assert run(arguments) == 0
        printed = capsys.readouterr().out
        assert not [word for word in expected if word not in printed]


def test_models_make_writes_a_pipeline(tmp_path: Path, capsys: Capture) -> None:
    assert run(["models", "make", "tiny-sd3", str(tmp_path / "model")]) == 0
    assert str(tmp_path / "model") in capsys.readouterr().out
    assert locate(str(tmp_path / "model")).family.name == "sd3"
    (tmp_path / "mine").write_text("x")
    arguments = ["models", "make", "tiny-sd3", str(tmp_path / "mine")]
    assert "exists and is not tiny-sd3" in refusal(arguments, tmp_path, capsys)
    error = refusal(["models", "make", "tiny-sd4", str(tmp_path / "x")], tmp_path, capsys)
    assert all(name in error.partition("Known: ")[2] for name in EMBEDDED)
