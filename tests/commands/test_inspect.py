"""diffc inspect: what an artifact and a model are, and what comes next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffc.artifact.folder import Artifact
from diffc.cli.main import run
from diffc.commands.inspect import inspect, next_command
from diffc.errors import DiffcError
from diffc.models.sources.locate import locate
from diffc.quantize.formats import FORMATS
from tests.cli_helpers import Capture
from tests.conftest import Cells


def test_an_artifact(compiled: Cells, capsys: Capture) -> None:
    cell = compiled("tiny-sd3", "fp8")
    assert run(["inspect", str(cell.folder), "--passes"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "tiny-sd3, fp8 in float16",
        "Made for batch 1 to 4 (best 2)",
        "model.onnx_data",
        "of the original's",
    ):
        assert said in text
    assert all(record.name in text for record in cell.result.passes)
    assert run(["inspect", str(cell.folder), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["manifest"] == json.loads((cell.folder / "manifest.json").read_text())
    found = inspect(str(cell.folder))
    assert isinstance(found, Artifact)
    assert next_command(found).startswith("diffc generate ")


def test_a_model(capsys: Capture) -> None:
    assert run(["inspect", "tiny-sd3"]) == 0
    text = capsys.readouterr().out
    source = locate("tiny-sd3")
    assert "SD3Transformer2DModel" in text
    assert f"in {len(source.weights)} tensors" in text
    assert all(name in text for name in FORMATS)
    assert run(["inspect", "tiny-sd3", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["parameters"] == source.parameters
    assert content["bytes_by_format"]["none"] == source.nbytes
    assert content["bytes_by_format"]["fp8"] == source.parameters


def test_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="is not an artifact, and not a model"):
        inspect(str(tmp_path))
