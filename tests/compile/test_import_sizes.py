"""An ONNX file that takes fewer sizes than it says: what is printed and asked for is what it runs at."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from diffc.artifact.folder import Artifact
from diffc.compile.import_onnx import import_result
from diffc.compile.onnx_model import compile_onnx
from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError
from diffc.progress import Silent
from tests.validate.sized_networks import film, positions, unet


def saved(model: onnx.ModelProto, folder: Path) -> str:
    onnx.save(model, folder / "model.onnx")
    return str(folder / "model.onnx")


def test_a_size_that_constants_hold_is_a_number_in_the_artifact(tmp_path: Path) -> None:
    file = saved(positions(60), tmp_path)
    compile_onnx(CompileRequest(file, tmp_path / "out", profile="batch=1:2:4,tokens=60"), Silent())
    (value,) = Artifact.load(tmp_path / "out").manifest["inputs"]
    assert value["dims"] == ["batch", 60, 8]
    with pytest.raises(DiffcError, match=r"more than tokens=60,[\s\S]*give tokens=60 in --profile"):
        compile_onnx(CompileRequest(file, tmp_path / "other", profile="tokens=30:60:60"), Silent())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("height", "says"), [("8:16:18", "largest"), ("6:8:16", "smallest")])
def test_ends_of_a_profile_are_sizes_at_which_the_graph_runs(height: str, says: str, tmp_path: Path) -> None:
    request = CompileRequest(
        saved(unet(), tmp_path), tmp_path / "out", profile=f"batch=1:1:2,height={height},width=8:16:16"
    )
    with pytest.raises(DiffcError, match=f"does not run at the {says} sizes of --profile .*height"):
        compile_onnx(request, Silent())


def test_passes_are_compared_at_sizes_that_only_the_graph_tells(tmp_path: Path) -> None:
    result = import_result(saved(film(moving=False), tmp_path), ui=Silent())
    changed = [record.check for record in result.records if record.changed]
    assert changed
    assert all("outputs within" in check for check in changed)
