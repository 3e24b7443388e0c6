"""Engines of a cached artifact: one for each of its models, in both layouts, for the shapes of their own inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from diffc.backends.onnxruntime.run import OrtModel, SessionOptions
from diffc.backends.profile import Profile
from diffc.backends.signature import Signature, pick_profile
from diffc.backends.target import TARGETS
from diffc.backends.tensorrt.run import pick_engine
from diffc.compile.engines import engine_profile
from diffc.models.inputs import random_inputs
from diffc.models.registry import find_family
from diffc.models.spec import Shape
from diffc.runtime.cached import open_cached
from tests.conftest import HAS_RTX, Cells

PLANS = {"digits-sd3": "blocks:first=0", "digits-flux": "blocks:first=0", "digits-sdxl": "deepcache:every=2"}
LAYOUTS = {"full+reduced": ["-keep", "-reuse-1"], "segments": ["-part-1", "-part-2", "-part-3"]}
SMS = (89, 120)
SHAPES = (Shape(1, 64, 96, 90), Shape(2, 64, 64, 333))  # inside the profile

pytestmark = [
    pytest.mark.slow,  # a minute each
    pytest.mark.skipif(not HAS_RTX, reason="needs the TensorRT-RTX builder"),
]


def cell(compiled: Cells, model: str, format: str, layout: str) -> Any:
    options = {"cache_plan": PLANS[model], "cache_layout": layout, "sms": SMS, "skip_validation": True}
    return compiled(model, format, targets=("trt-rtx", "ort"), dtype="float32", **options)


@pytest.mark.parametrize(("model", "format", "layout"), itertools.product(PLANS, ("none", "fp8"), LAYOUTS))
def test_every_model_of_the_plan_is_built(compiled: Cells, model: str, format: str, layout: str) -> None:
    done = cell(compiled, model, format, layout)
    names = {f"trt-rtx-sm{sm}{suffix}.engine" for sm in SMS for suffix in LAYOUTS[layout]}
    assert {p.name for p in (done.folder / "engines").glob("*.engine")} == names
    assert {e["file"] for e in done.artifact.manifest["engines"]} == {f"engines/{name}" for name in names}
    assert all(e["layers"] > 0 for e in done.artifact.manifest["engines"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_session_over_engines_finds_each_and_stays_in_its_profile(compiled: Cells, layout: str) -> None:
    """What diffc.load does for engines; their graphs run in ONNX Runtime, since no engine runs without its GPU."""
    done = cell(compiled, "digits-sd3", "none", layout)
    spec, config = find_family("sd3"), done.artifact.manifest["model"]["config"]
    profile = engine_profile(spec.input_dims(config), spec, done.plan.profile)
    signature = Signature.of(done.artifact.manifest, spec.dims(config), (profile,))
    seen: list[tuple[str, Profile]] = []

    class Checked(OrtModel):
        signature: Signature

        def run(self, inputs: Any, output_shapes: Any) -> Any:
            pick_profile(self.signature.profiles, {n: tuple(t.shape) for n, t in inputs.items()})
            found = super().run(inputs, output_shapes)
            assert all(torch.isfinite(t).all() for t in found.values())
            return found

    def open_one(artifact: Any, own: Signature) -> Any:
        entry = pick_engine(artifact.manifest["engines"], "trt-rtx", 89)
        seen.append((entry["file"], own.profiles[0]))
        plan = SessionOptions(
            artifact.folder / artifact.manifest["targets"]["ort"], TARGETS["ort"], torch.device("cpu")
        )
        session = Checked(plan, own)
        session.signature = own
        return session

    session = open_cached(done.artifact, spec, signature, open_one)
    assert [file for file, _ in seen] == [f"engines/trt-rtx-sm89{s}.engine" for s in LAYOUTS[layout]]
    assert all(sizes.min != sizes.max for _, own in seen for sizes in own.inputs.values())
    for shape in SHAPES:
        values = random_inputs(spec, config, shape, dtype=torch.float32, seed=3)
        first = session.run(values, signature.output_shapes(spec.sizes(shape)))
        later = values | {"timestep": values["timestep"] / 2}
        again = session.run(later, signature.output_shapes(spec.sizes(shape)))
        (name,) = first
        assert not torch.equal(first[name], again[name])
    session.close()
