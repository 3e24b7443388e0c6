"""Files that are written beside their name: never through a link, never over what is no file, whole or not at all."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from diffc.artifact.folder import staging
from diffc.cli.main import run
from diffc.commands.bench import output
from diffc.errors import DiffcError
from diffc.output_files import check_output_file
from diffc.quality.pictures import save_png
from passes.base import PassError
from passes.files.atomic import check_own, drop, open_new, open_own, write_bytes, write_text, written
from passes.storage import save
from passes.weights.journal import Journal
from tests.cli_helpers import Capture, refusal

VICTIM = b"not to be touched"
posix = pytest.mark.skipif(os.name == "nt", reason="has no such files")


def linked(link: Path) -> Path:
    """A file that somebody wants overwritten, behind the link `link`."""
    victim = link.parent / "victim"
    victim.write_bytes(VICTIM)
    try:
        link.symlink_to(victim)
    except OSError:
        pytest.skip("this account may not make links")
    return victim


def model(folder: Path) -> Path:
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), "W")
    value = helper.make_tensor_value_info
    x, y = value("x", TensorProto.FLOAT, ["n", 64]), value("y", TensorProto.FLOAT, ["n", 64])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"], "m")], "g", [x], [y], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(made, folder / "in.onnx")
    return folder / "in.onnx"


@pytest.mark.parametrize("name", ["o.onnx_data.partial", "o.onnx.partial", "o.onnx_data.journal"])
def test_the_writer_of_weights_opens_nothing_through_a_link(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    victim = linked(tmp_path / name)
    arguments = ["opt", str(model(tmp_path)), "-p", "remove-unused", "-o", str(tmp_path / "o.onnx")]
    assert "it is a link. Fix: remove it" in refusal(arguments, tmp_path, capsys)
    assert victim.read_bytes() == VICTIM
    assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("open_it", [open_own, lambda path: open_own(path, new=True)])
def test_only_a_file_of_our_own_is_taken_up(
    open_it: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = linked(tmp_path / "link")
    (tmp_path / "folder").mkdir()
    os.link(victim, tmp_path / "second")
    for name, reason in (("link", "a link"), ("folder", "a folder"), ("second", "a second name")):
        with pytest.raises(PassError, match=reason):
            open_it(tmp_path / name)
    assert victim.read_bytes() == VICTIM
    if hasattr(os, "geteuid"):
        (tmp_path / "theirs").write_bytes(VICTIM)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(PassError, match="another user"):
            open_it(tmp_path / "theirs")
        assert (tmp_path / "theirs").read_bytes() == VICTIM


def test_a_link_that_comes_after_the_look_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a system without O_NOFOLLOW, such as Windows, sees it."""
    from passes.files import atomic as beside

    victim = linked(tmp_path / "link")
    monkeypatch.setattr(beside, "check_own", lambda path: True)
    monkeypatch.setattr(beside, "_FLAGS", 0)
    with pytest.raises(PassError, match="it is a link"):
        open_own(tmp_path / "link")
    with pytest.raises(FileExistsError):
        open_new(tmp_path / "link")
    assert victim.read_bytes() == VICTIM


def test_our_own_is_gone_on_with_or_made_anew(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    with open_own(tmp_path / "a") as file:
        assert file.read() == b"before"
    with open_own(tmp_path / "a", new=True) as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert check_own(tmp_path / "a")
    drop(tmp_path / "a")
    assert not check_own(tmp_path / "a")


def test_a_journal_behind_a_link_is_neither_read_nor_written(tmp_path: Path) -> None:
    victim = linked(tmp_path / "journal")
    victim.write_text('"mine"\n')
    notes = Journal(tmp_path / "journal", "mine")
    for use in (notes.matches, lambda: notes.begin(tmp_path / "data")):
        with pytest.raises(PassError, match="it is a link"):
            use()
    assert victim.read_text() == '"mine"\n'


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with written(tmp_path / "a") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
    write_text(tmp_path / "a", "näw\n")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", "näw\n".encode())]


@posix
def test_a_file_has_the_rights_that_open_would_give_it(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_a_link_under_the_final_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = linked(tmp_path / "a")
    write_bytes(tmp_path / "a", b"new")
    assert (victim.read_bytes(), (tmp_path / "a").is_symlink()) == (VICTIM, False)


def test_an_unfinished_artifact_is_not_built_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    try:
        (tmp_path / ".out.partial").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("this account may not make links")
    with pytest.raises(PassError, match="it is a link"), staging(tmp_path / "out", force=False):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())


def odd_places(folder: Path) -> dict[str, Path]:
    """What must not be replaced, by what it is called."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(folder / "socket"))
    made.close()
    (folder / "link").symlink_to("/dev/null")
    return {
        "a folder": folder / "folder",
        "a named pipe": folder / "pipe",
        "a socket": folder / "socket",
        "a device": folder / "link",
    }


@posix
def test_what_is_no_file_is_not_replaced_by_any_writer(tmp_path: Path) -> None:
    for kind, path in odd_places(tmp_path).items():
        mode = path.lstat().st_mode
        writers: tuple[Callable[[Path], object], ...] = (
            check_output_file,
            output.check_folder,
            lambda p: save_png(Image.new("RGB", (2, 2)), p),
            lambda p: write_text(p, "x"),
            lambda p: save(onnx.load(model(tmp_path)), p),
        )
        for write in writers:
            with pytest.raises((DiffcError, PassError), match=f"{kind}, not a file: it is left as it is"):
                write(path)
        assert path.lstat().st_mode == mode
    assert not list(tmp_path.glob("*.partial"))


@posix
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "no-artifact", "--prompt", "x", "-o"),
        ("bench", "no-artifact", "--json"),
        ("opt", "in.onnx", "-p", "remove-unused", "--force", "-o"),
        ("import", "in.onnx", "--force", "-o"),
        ("cache", "search", "tiny-sd3", "-o"),
    ],
)
def test_commands_refuse_before_they_start(
    command: tuple[str, ...], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path)
    for kind, path in odd_places(tmp_path).items():
        assert run([*command, str(path)]) == 1
        assert f"{path} is {kind}, not a file: it is left as it is" in capsys.readouterr().err


@posix
def test_a_plot_is_refused_before_anything_is_measured(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    os.mkfifo(tmp_path / "p.png")
    assert run(["bench", str(tmp_path), "--plot", str(tmp_path / "p.png")]) == 1
    assert "p.png is a named pipe" in capsys.readouterr().err


@posix
def test_weights_beside_the_model_are_an_output_too(tmp_path: Path, capsys: Capture) -> None:
    os.mkfifo(tmp_path / "o.onnx_data")
    arguments = [
        "opt",
        str(model(tmp_path)),
        "-p",
        "remove-unused",
        "--force",
        "-o",
        str(tmp_path / "o.onnx"),
    ]
    assert "o.onnx_data is a named pipe" in refusal(arguments, tmp_path, capsys)
