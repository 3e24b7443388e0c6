"""Several processes at one place, and an output that is another command's input: nothing is lost, nothing is half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from filelock import Timeout
from onnx import TensorProto, helper, numpy_helper

from diffc.artifact.folder import Artifact, staging, write_manifest
from diffc.cli.main import run
from diffc.locks import locked
from passes.files.atomic import exchange
from tests import ROOT
from tests.artifact.manifests import described
from tests.cli_helpers import Capture


def together(kinds: list[str], place: Path, seconds: float) -> list[dict[str, int]]:
    """What the processes of tests/faults/writers.py saw, side by side."""
    command = [sys.executable, "-m", "tests.faults.writers"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [*command, kind, str(place), str(seconds)], stdout=subprocess.PIPE, cwd=ROOT, env=environment
        )
        for kind in kinds
    ]
    return [json.loads(process.communicate()[0]) for process in started]


@pytest.mark.parametrize(
    ("seconds", "readers"), [(2.5, 1), pytest.param(60.0, 3, marks=pytest.mark.slow)], ids=["short", "minute"]
)
def test_never_two_writers_inside_and_never_half_an_artifact(
    seconds: float, readers: int, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    with staging(place, force=False) as folder:
        (folder / "model.onnx").write_bytes(b"first")
        write_manifest(folder, described(targets={"ort": "model.onnx"}), {})
    found = together([*["write"] * 3, *["read"] * readers], place, seconds)
    print(json.dumps(found))
    writers, seen = found[:3], found[3:]
    assert [writer["together"] for writer in writers] == [0, 0, 0]
    assert all(writer["written"] for writer in writers)
    assert sum(writer["refused"] for writer in writers)
    for reader in seen:
        assert reader["read"] > 20
        assert (reader["failed"], reader["bare"]) == (0, 0), reader
    Artifact.load(place).verify()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_on_the_file_that_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path):
        with pytest.raises(Timeout), locked(path):
            pass
        assert path.is_file()
        path.unlink()  # as a holder of an older version did
        with locked(path):
            assert path.is_file()
    assert not path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call")
def test_two_folders_change_names_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").is_file()
    assert not exchange(tmp_path / "a", tmp_path / "c")


def model(folder: Path, name: str, data: str) -> Path:
    """A model whose weight lies in the file `data`."""
    array = np.random.default_rng(8).normal(size=(64, 64)).astype(np.float32)
    weight = numpy_helper.from_array(array, "W")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 64]) for n in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"], "m")], "g", [x], [y], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(made, folder / name, save_as_external_data=True, location=data, size_threshold=0)
    return folder / name


@pytest.mark.parametrize(
    ("data", "output"), [("o.onnx_data", "o.onnx"), ("w.bin", "w.bin"), ("o.onnx", "o.onnx")]
)
def test_an_output_that_holds_the_weights_of_the_input(
    data: str, output: str, tmp_path: Path, capsys: Capture
) -> None:
    source = model(tmp_path, "in.onnx", data)
    before = (tmp_path / data).read_bytes()
    assert run(["opt", str(source), "-p", "remove-unused", "-o", str(tmp_path / output), "--force"]) == 1
    assert "holds weights of the model" in capsys.readouterr().err
    assert (tmp_path / data).read_bytes() == before
