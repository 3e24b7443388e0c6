"""The writer after a kill: it goes on where it was, gives the bytes of an undisturbed run, and trusts nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from passes.base import PassError
from passes.storage import save, save_all
from passes.weights import journal as journal_module
from passes.weights import layout, writer
from passes.weights.evaluate import Task, tasks
from passes.weights.journal import Journal
from passes.weights.recipe import Recipe, Source
from tests import ROOT

COUNT, SHAPE = 24, (256, 512)


def weights(folder: Path) -> dict[str, Recipe]:
    """Weights of every kind of format over one file of random bfloat16 values, made when it is not there."""
    file = folder / "source.bin"
    if not file.exists():
        rng = np.random.default_rng(11)
        values = rng.standard_normal((COUNT, *SHAPE), dtype=np.float32) * 0.03
        file.write_bytes(values.astype(ml_dtypes.bfloat16).tobytes())
    length = SHAPE[0] * SHAPE[1] * 2
    scale = Recipe.of_array(np.float32(1e-4))
    found = {}
    for i in range(COUNT):
        raw = Recipe.of_source(
            Source("raw", str(file), TensorProto.BFLOAT16, SHAPE, f"w{i}", i * length, length)
        )
        found |= {
            f"plain{i}": raw,
            f"fp8{i}": raw.quantize(scale, TensorProto.FLOAT8E4M3FN).transpose((1, 0)),
            f"fp4{i}": raw.nvfp4_values(scale),
            f"blocks{i}": raw.nvfp4_scales(scale),
            f"scale{i}": raw.amax().scale_of_amax(448.0),
        }
    return found


def model(recipes: dict[str, Recipe]) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in recipes]
    outputs = [helper.make_tensor_value_info(f"{n}_out", r.dtype, r.shape) for n, r in recipes.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, [r.to_tensor(n) for n, r in recipes.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes of which tasks were made, in order."""
    seen: list[Recipe] = []

    def counting(recipe: Recipe) -> object:
        seen.append(recipe)
        return tasks(recipe)

    monkeypatch.setattr(writer, "tasks", counting)
    monkeypatch.setattr(journal_module, "EVERY", 1 << 16)
    return seen


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "expected").mkdir()
    save(model(weights(tmp_path)), tmp_path / "expected" / "m.onnx")
    return contents(tmp_path / "expected")


class Killed(BaseException):
    """Stands for a kill in this process: the writer's own clearing up is left out with it."""


def stop_after(count: int, recipes: dict[str, Recipe], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write until `count` tensors are on disk, then end as a kill does: with no clearing up."""

    def stop(*_: object) -> None:
        nonlocal count
        count -= 1
        if not count:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            save(model(recipes), path, stop)


@pytest.mark.parametrize("count", [1, 7, 40, COUNT * 4])
def test_what_is_on_disk_is_not_computed_again(
    count: int,
    tmp_path: Path,
    expected: dict[str, bytes],
    counted: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "out").mkdir()
    stop_after(count, weights(tmp_path), tmp_path / "out" / "m.onnx", monkeypatch)
    counted.clear()
    save(model(weights(tmp_path)), tmp_path / "out" / "m.onnx")
    assert contents(tmp_path / "out") == expected
    assert len(counted) <= COUNT * 4 - count + 3  # those since the last line of the journal are done again


@pytest.mark.parametrize("damage", ["data", "cut", "journal", "line", "source", "recipe", "code", "grown"])
def test_what_does_not_fit_is_not_taken(
    damage: str,
    tmp_path: Path,
    expected: dict[str, bytes],
    counted: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stop_after(50, weights(tmp_path), out / "m.onnx", monkeypatch)
    partial, notes = out / "m.onnx_data.partial", out / "m.onnx_data.journal"
    recipes = weights(tmp_path)
    if damage == "data":
        data = bytearray(partial.read_bytes())
        data[100] ^= 1
        partial.write_bytes(data)
    elif damage == "cut":
        os.truncate(partial, partial.stat().st_size // 2)
    elif damage == "grown":
        partial.write_bytes(partial.read_bytes() + b"more" * 1000)
    elif damage == "journal":
        notes.write_bytes(b"\xff{")
    elif damage == "line":
        notes.write_text(notes.read_text()[:-20])
    elif damage == "source":
        source = tmp_path / "source.bin"
        source.write_bytes(source.read_bytes()[2:] + bytes(2))
    elif damage == "recipe":
        recipes["plain0"] = recipes["plain0"].transpose((1, 0))
    elif damage == "code":
        monkeypatch.setattr(layout, "code_version", lambda: "another")
    (tmp_path / "fresh").mkdir()
    save(model(recipes), tmp_path / "fresh" / "m.onnx")
    counted.clear()
    save(model(recipes), out / "m.onnx")
    assert contents(out) == contents(tmp_path / "fresh")
    assert (contents(out) == expected) == (damage not in ("source", "recipe"))
    partly = {"cut": COUNT * 4 - 5, "line": 60, "grown": 60}
    assert len(counted) <= partly.get(damage, COUNT * 4)
    if damage not in partly:
        assert len(counted) == COUNT * 4


def test_a_journal_that_is_given_stays_and_saves_all_work(tmp_path: Path, counted: list[Recipe]) -> None:
    out, notes = tmp_path / "out", tmp_path / "notes"
    out.mkdir()
    first = save_all({out / "m.onnx": model(weights(tmp_path))}, journal=notes)
    assert notes.is_file()
    counted.clear()
    again = save_all({out / "m.onnx": model(weights(tmp_path))}, journal=notes)
    assert (again, counted) == (first, [])
    (out / "m.onnx_data").write_bytes(bytes(first[1].nbytes))
    assert save_all({out / "m.onnx": model(weights(tmp_path))}, journal=notes) == first
    assert len(counted) == COUNT * 4


@pytest.mark.usefixtures("counted")
def test_an_error_leaves_neither_data_nor_journal(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(PassError, match="no space left"):
        save(model(weights(tmp_path)), tmp_path / "out" / "m.onnx", full)
    assert contents(tmp_path / "out") == {}


def test_the_journal_counts_what_is_verified_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"")
    notes = Journal(tmp_path / "journal", "one")
    length, digest = notes.begin(data)
    for part in (b"a" * 1000, b"b" * 2000):
        with data.open("ab") as file:
            file.write(part)
        digest.update(part)
        length += len(part)
        notes.record(length, digest, force=True)
    later = Journal(tmp_path / "journal", "one")
    assert later.matches()
    assert later.begin(data)[0] == 3000
    assert Journal(tmp_path / "journal", "one").begin(data)[1].hexdigest() == digest.hexdigest()
    data.write_bytes(b"a" * 1000 + b"c" * 2000)
    assert Journal(tmp_path / "journal", "one").begin(data)[0] == 1000
    assert not Journal(tmp_path / "journal", "two").matches()
    assert Journal(tmp_path / "journal", "two").begin(data)[0] == 0


CHILD = """
import time
from pathlib import Path
from tests.passes.weights.test_writer import model, weights
from passes.weights import journal
from passes.storage import save
journal.EVERY = 1 << 16
folder = Path({folder!r})
made = model(weights(folder))
print("ready", flush=True)
save(made, folder / "killed" / "m.onnx", lambda *_: time.sleep(0.002))
"""


def test_killed_at_random_moments_gives_the_same_bytes(tmp_path: Path, expected: dict[str, bytes]) -> None:
    (tmp_path / "killed").mkdir()
    code = CHILD.format(folder=str(tmp_path))
    rng, lengths = np.random.default_rng(3), []
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.5))
        child.kill()
        child.communicate()
        partial = tmp_path / "killed" / "m.onnx_data.partial"
        lengths.append(partial.stat().st_size if partial.exists() else -1)
    assert any(length > 0 for length in lengths), f"no kill came while it wrote: {lengths}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "killed") == expected


@pytest.mark.usefixtures("counted")
def test_room_that_the_partial_file_has_already_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    stop_after(60, weights(tmp_path), tmp_path / "out" / "m.onnx", monkeypatch)
    asked: list[int] = []
    monkeypatch.setattr(writer, "_check_room", lambda folder, needed: asked.append(needed))
    save(model(weights(tmp_path)), tmp_path / "out" / "m.onnx")
    total = (tmp_path / "out" / "m.onnx_data").stat().st_size
    assert 0 < asked[0] < total * 0.6


@pytest.mark.usefixtures("counted")
def test_the_journal_is_lines_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    stop_after(20, weights(tmp_path), tmp_path / "out" / "m.onnx", monkeypatch)
    identity, *lines = map(json.loads, (tmp_path / "out" / "m.onnx_data.journal").read_text().splitlines())
    assert len(identity) == 64
    assert [length for length, _ in lines] == sorted(length for length, _ in lines)


def test_tasks_are_the_result_in_parts() -> None:
    rng = np.random.default_rng(2)
    source = Recipe.of_array(rng.standard_normal((37, 5)).astype(np.float32))
    parts: list[Task] = list(tasks(source.cast(TensorProto.FLOAT16)))
    whole = np.concatenate([part() for part in parts]).reshape(37, 5)
    assert (
        whole.tobytes() == np.frombuffer(bytes.fromhex(source.source.key), np.float32).astype("f2").tobytes()
    )


MEASURED = """
import resource
from pathlib import Path
import numpy as np
from onnx import TensorProto
from tests.passes.weights.test_writer import model
from passes.storage import save
from passes.weights.recipe import Recipe, Source
folder, (rows, columns) = Path({folder!r}), {shape!r}
source = Source("raw", str(folder / "large.bin"), TensorProto.FLOAT, (rows, columns), "w", 0, rows * columns * 4)
scale = Recipe.of_array(np.float32(0.01))
save(model({{"small": Recipe.of_array(np.ones(2000, np.float32))}}), folder / "small.onnx")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weight = Recipe.of_source(source)
save(model({{"w": weight.{operation}}}), folder / "large.onnx")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize(
    "operation",
    [
        "quantize(scale, TensorProto.FLOAT8E4M3FN)",
        "quantize(scale, TensorProto.FLOAT8E4M3FN).transpose((1, 0))",
        "nvfp4_values(scale)",
        "cast(TensorProto.BFLOAT16)",
    ],
)
def test_a_large_weight_needs_no_more_than_its_own_size(operation: str, tmp_path: Path) -> None:
    """Of 15360 x 1024 in float32: the mapped source, 63 MB, a transposed result, and 40 MB for parts under way."""
    shape = (15360, 1024)
    rng = np.random.default_rng(1)
    (tmp_path / "large.bin").write_bytes(rng.standard_normal(shape, dtype=np.float32).tobytes())
    code = MEASURED.format(folder=str(tmp_path), shape=shape, operation=operation)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(done.stdout) * 1024 < 1.25 * shape[0] * shape[1] * 4 + 40e6


def test_a_small_disk_is_told_in_units_that_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 1 GB it said that 0.00 GB were needed and 0.00 GB free (F21)."""
    free = shutil.disk_usage(tmp_path)._replace(free=70_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(PassError, match=r"393 kB are needed, 70 kB are free\. Fix: free some space"):
        writer._check_room(tmp_path, 393_216)


def test_no_room_for_temporary_files_says_how_to_put_them_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, fix in (("diffc-x1", "set TMPDIR"), ("mine", "or name another output")):
        (tmp_path / name).mkdir()
        with pytest.raises(PassError, match=f"no room on .*{fix}"):
            writer._check_room(tmp_path / name, 1 << 60)
