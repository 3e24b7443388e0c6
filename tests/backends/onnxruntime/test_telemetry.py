"""ONNX Runtime keeps no id of the machine and no record of what runs, unless somebody asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT

SESSION = """
import diffc
import onnxruntime
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
"""


def test_a_session_leaves_nothing_in_the_home_and_temporary_folders(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    places = {"HOME": home, "USERPROFILE": home, "LOCALAPPDATA": home, "TMPDIR": temporary, "TEMP": temporary}
    kept = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")}
    environment = kept | {name: str(folder) for name, folder in places.items()} | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SESSION], env=environment, check=True, timeout=120)
    assert not list(tmp_path.rglob("*.*"))
    assert not list(tmp_path.rglob("*deviceid*"))
