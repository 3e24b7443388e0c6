"""An export of ModelOpt's scripts (tests/data/README.md) through the import, against ModelOpt's own torch model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffc.artifact.describe import NOT_COMPARED
from diffc.backends.target import find_target
from diffc.compile.import_onnx import import_result
from diffc.compile.import_profile import profile_of
from diffc.frontend.onnx_file import read_model
from diffc.progress import Silent
from diffc.validate.float32 import cpu_session, feed, float32_copy
from tests import DATA
from tests.networks import rel_l2


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    with np.load(DATA / "modelopt_sd3_nvfp4.npz") as held:
        values = dict(held)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    path.write_bytes(values.pop("onnx").tobytes())
    return path, values


def test_outputs_are_those_of_modelopt_at_both_sizes(export: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, values = export
    result = import_result(path, ui=Silent())
    checks = [record.check for record in result.records if record.changed]
    assert any("outputs within" in check for check in checks)
    assert all("outputs within" in check or NOT_COMPARED in check for check in checks)
    copy = float32_copy(result.model)
    with cpu_session(copy) as session:
        for size in (0, 1):
            feeds = {v.name: values[f"in{size}_{v.name}"] for v in copy.graph.input}
            (found,) = session.run(feed(copy, feeds)).values()
            assert rel_l2(found, values[f"wide{size}"]) < 3e-2


def test_the_profile_asks_for_the_batch_once_and_not_for_channels(
    export: tuple[Path, dict[str, np.ndarray]],
) -> None:
    model = read_model(export[0]).model
    text = "batch_size=1:2:4,height=8:16:32,width=8:16:32,sequence_length=16:77:154"
    (profile,) = profile_of(model, text, [find_target("trt-rtx")])
    assert profile.inputs["timestep"].max == (4,)
    assert profile.inputs["hidden_states"].min == (1, 16, 8, 8)
