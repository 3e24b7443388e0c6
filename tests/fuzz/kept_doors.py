"""Two more doors: a calibration of ModelOpt's (`.pt`), and what a killed writer of weights left, which is taken up."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from diffc.quantize.checkpoint import Checkpoint
from passes.storage import load, save
from passes.weights.journal import Journal
from passes.weights.layout import identity_of, lay_out
from tests.fuzz.doors import Door, files
from tests.fuzz.lies import damaged, lied


def layers() -> torch.nn.Module:
    """The unquantized model, with a config as backbones of diffusers have it."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
    model.config = {}  # type: ignore[assignment]
    return model


def _calibrated(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq

    with torch.random.fork_rng(devices=[]):
        model = layers()
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(torch.ones(2, 16)))
    mto.save(model, folder / "b.pt")
    content = torch.load(folder / "b.pt", weights_only=False)
    return files("b.pt", _torch_file(content, (folder / "b.pt").read_bytes()))


@st.composite
def _torch_file(draw: st.DrawFn, content: Any, data: bytes) -> bytes:
    """A file of torch.save whose content lies, or damaged."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(data))
    made = io.BytesIO()
    torch.save(draw(lied(content)), made)
    return made.getvalue()


def _use_calibrated(folder: Path) -> None:
    found = Checkpoint.from_modelopt(folder / "b.pt", layers(), family="flux")
    assert found.format == "fp8"
    assert all((value > 0).all() and np.isfinite(value).all() for value in found.amax.values())


def _weights() -> onnx.ModelProto:
    values = np.random.default_rng(9).normal(size=(3, 64, 64)).astype(np.float32)
    weights = [numpy_helper.from_array(value, f"W{index}") for index, value in enumerate(values)]
    nodes = [
        helper.make_node("MatMul", [f"x{index}", f"W{index}"], [f"x{index + 1}"], f"m{index}")
        for index in range(3)
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("x0", "x3"))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def _journal(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    """The journal of a writer that was killed when it was done, and the file that it had written."""
    onnx.save(_weights(), folder / "m.onnx")
    model = load(folder / "m.onnx")
    (folder / "whole").mkdir()
    save(model, folder / "whole" / "o.onnx")
    whole = (folder / "whole" / "o.onnx_data").read_bytes()
    (folder / "o.onnx_data.partial").write_bytes(whole)
    half = len(whole) // 2
    hashed = [[n, hashlib.sha256(whole[:n]).hexdigest()] for n in (half, len(whole))]
    identity = identity_of(lay_out([model]))
    lines = [identity, *hashed]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "o.onnx_data.journal").write_bytes(text)
    assert Journal(folder / "o.onnx_data.journal", identity).matches()
    lies = lied(lines).map(lambda made: "".join(json.dumps(line) + "\n" for line in _listed(made)).encode())
    return st.one_of(
        files("o.onnx_data.journal", lies),
        files("o.onnx_data.journal", damaged(text)),
        files("o.onnx_data.partial", damaged(whole)),
    )


def _listed(made: Any) -> list[Any]:
    return made if isinstance(made, list) else [made]


def _use_journal(folder: Path) -> None:
    """Whatever is taken up, what is written is right."""
    save(load(folder / "m.onnx"), folder / "o.onnx")
    for name in ("o.onnx", "o.onnx_data"):
        assert (folder / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert not list(folder.glob("*.partial"))
    assert not list(folder.glob("*.journal"))


KEPT_DOORS = (
    Door("calibration of ModelOpt", _calibrated, _use_calibrated),
    Door("journal of weights", _journal, _use_journal),
)
