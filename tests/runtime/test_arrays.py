"""diffc.session: numpy in and out, without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import diffc
from diffc.errors import DiffcError
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import find_family
from diffc.models.spec import Shape
from diffc.runtime import module as runtime_module
from tests.conftest import Cell, Cells

SMALL = {"targets": ("ort",), "sms": (), "dtype": "float32", "skip_validation": True}
WITHOUT_TORCH = """
import sys
for name in ("torch", "diffusers", "transformers", "modelopt", "accelerate", "onnxscript"):
    sys.modules[name] = None  # importing it fails
import numpy as np
import diffc
with diffc.session(sys.argv[1]) as session:
    sizes = {"batch": 2, "height": 8, "width": 12, "text": 8}
    shapes = {v.name: [sizes.get(d, d) for d in v.dims] for v in session.inputs}
    rng = np.random.default_rng(3)
    found = session.run({name: rng.standard_normal(shape) for name, shape in shapes.items()})
assert all(np.isfinite(array).all() and np.abs(array).max() > 0 for array in found.values())
try:
    diffc.load
except diffc.DiffcError as error:
    assert "torch is not installed" in str(error) and "diffc.session" in str(error)
else:
    raise AssertionError("diffc.load without torch")
print(*(f"{name}{list(array.shape)}" for name, array in found.items()))
"""


@pytest.fixture
def cell(compiled: Cells) -> Cell:
    return compiled("digits-sd3", "none", **SMALL)


def test_it_gives_what_diffc_load_gives(cell: Cell) -> None:
    spec = find_family("sd3")
    with diffc.session(cell.folder, verify=True) as session, diffc.load(cell.folder) as module:
        for shape in (Shape(1, 64, 64, 8), Shape(3, 64, 96, 20)):
            drawn = random_inputs(spec, module.config, shape, dtype=torch.float32, seed=5)
            arrays = {
                name: value.numpy().astype(np.float64) for name, value in drawn.items()
            }  # cast to the graph's
            (found,) = session.run(arrays).values()
            (expected,) = module(**forward_kwargs(spec, module.config, drawn), return_dict=False)
            assert np.array_equal(found, expected.numpy())


def test_neither_torch_nor_diffusers_is_needed(cell: Cell) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(cell.folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("[")[0] == "out_hidden_states"


def test_a_wrong_feed_is_refused_by_name(cell: Cell) -> None:
    with diffc.session(cell.folder) as session:
        good = {
            v.name: np.ones([{"batch": 1, "text": 8}.get(d, 8) if isinstance(d, str) else d for d in v.dims])
            for v in session.inputs
        }
        session.run(good)
        with pytest.raises(DiffcError, match="timestep"):
            session.run({name: array for name, array in good.items() if name != "timestep"})
        with pytest.raises(DiffcError, match="guidance"):
            session.run(good | {"guidance": np.ones(1)})
        with pytest.raises(DiffcError, match="input timestep has shape"):
            session.run(good | {"timestep": np.ones(2)})
        with pytest.raises(DiffcError, match="multiples of"):
            session.run(good | {"hidden_states": np.ones([1, 16, 7, 8])})
    with pytest.raises(DiffcError, match="closed"):
        session.run(good)


def test_a_target_that_is_not_there_is_refused(cell: Cell) -> None:
    with pytest.raises(DiffcError, match="was compiled for ort"):
        diffc.session(cell.folder, target="ort-cuda")
    with pytest.raises(DiffcError, match="unknown target for numpy arrays"):
        diffc.session(cell.folder, target="trt-rtx")


def test_a_module_without_diffusers_has_the_config_of_the_artifact(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(runtime_module, "import_module", _no_module)
    with diffc.load(cell.folder) as module:
        assert module.config.joint_attention_dim == module.config["joint_attention_dim"]
        assert not hasattr(module.config, "nothing")
        drawn = random_inputs(
            find_family("sd3"), module.config, Shape(1, 64, 64, 8), dtype=torch.float32, seed=1
        )
        assert module(**drawn).sample.shape == (1, 16, 8, 8)


def _no_module(name: str) -> object:
    raise ImportError(name)
