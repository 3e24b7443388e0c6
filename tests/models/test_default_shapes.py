"""One profile decides everything: what each command does by default lies in what the engines are built for."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from diffc.artifact.folder import Artifact
from diffc.backends.signature import pick_profile
from diffc.backends.target import find_target
from diffc.commands.bench.run import BenchRequest
from diffc.commands.bench.run import plan as bench_plan
from diffc.commands.generate import usual_size
from diffc.compile.engines import engine_profile
from diffc.compile.plan import Plan
from diffc.compile.request import CompileRequest
from diffc.errors import UsageError
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.models.embedded.real import REAL
from diffc.models.profiles import default_profile, native_shape, painted_size, parse_profile
from diffc.models.registry import find_family
from diffc.models.sources.locate import ModelSource, locate
from diffc.models.spec import Shape
from diffc.quantize.formats import find_format
from diffc.validate.comparisons import shapes_of

TARGETS = ("trt-rtx", "tensorrt", "ort", "ort-cuda")


def source_of(name: str) -> ModelSource:
    """The source of an embedded model, or one of a released model's config.json alone, without weights."""
    if name in EMBEDDED:
        return locate(name)
    model = REAL[name]
    return ModelSource(name, Path(name), None, model.config, find_family(model.family), {})


def planned(name: str, target: str, profile: str = "") -> Plan:
    """What a compile would do, without asking whether the target's builder is installed."""
    source = source_of(name)
    shapes = parse_profile(profile, source.family, source.config, painted_size(source.pipeline_dir))
    request = CompileRequest(model=name, output=Path("out"), targets=(target,), profile=profile)
    return Plan(request, source, find_format("none"), (find_target(target),), "float16", shapes)


def artifact_of(plan: Plan) -> Artifact:
    """What commands read of the artifact that the plan makes."""
    engines = [{"file": "engines/a.engine"}] if plan.targets[0].is_engine else []
    source = plan.source
    model: dict[str, Any] = {"family": source.family.name, "config": source.config}
    if source.family.interface is not None:
        model["captured"] = source.family.interface.to_json()
    manifest: dict[str, Any] = {
        "format": "none",
        "dtype": "float16",
        "model": model,
        "request": {"model": plan.source.name},
        "profile": asdict(plan.profile),
        "engines": engines,
    }
    return Artifact(Path("out"), json.loads(json.dumps(manifest)))


def defaults(plan: Plan) -> dict[str, list[Shape]]:
    """The shapes that each command takes where no option names any."""
    artifact, source = artifact_of(plan), plan.source
    batch = plan.profile.batch or "batch"
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [batch])
    model = helper.make_model(helper.make_graph([], "g", [value], []))
    painted = painted_size(source.pipeline_dir) or native_shape(source.family, source.config).height
    height, width = usual_size(artifact.manifest, painted)
    usual = native_shape(source.family, source.config, painted)
    return {
        "compile": list(plan.validation_shapes),
        "validate": list(shapes_of(artifact, model, ())),  # type: ignore[arg-type]  # a known family: Shape
        "bench": bench_plan(artifact, BenchRequest(Path("out"), against=("none",)))[1],
        "generate": [replace(usual, height=height, width=width)],
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*EMBEDDED, *REAL])
def test_every_default_is_inside_the_default_profile(name: str, target: str) -> None:
    plan = planned(name, target)
    family, config = plan.source.family, plan.source.config
    profile = engine_profile(family.input_dims(config), family, plan.profile)
    for command, shapes in defaults(plan).items():
        for shape in shapes:
            family.check(config, shape)
            if plan.targets[0].is_engine or command in ("bench", "generate"):
                assert pick_profile([profile], family.input_shapes(config, shape)) == 0, (command, shape)


@pytest.mark.parametrize("name", [*EMBEDDED, *REAL])
def test_the_default_profile_holds_what_the_pipeline_paints_and_is_best_there(name: str) -> None:
    source = source_of(name)
    painted = painted_size(source.pipeline_dir)
    profile = default_profile(source.family, source.config, painted)
    if name == "digits-video":
        assert (painted, profile.optimum.height, profile.optimum.frames) == (None, 32, 9)
    elif name.startswith("digits-"):
        assert painted == 64
    if painted is not None:
        assert (profile.optimum.height, profile.optimum.width) == (painted, painted)
    step = source.family.pixel_multiple(source.config)
    assert profile.minimum.height < profile.optimum.height or profile.optimum.height == step


@pytest.mark.parametrize("painted", [512, 768, 2048])
def test_a_vae_of_another_size_than_the_backbone_widens_the_profile(painted: int) -> None:
    family, config = find_family("sdxl"), REAL["sdxl"].config
    profile = default_profile(family, config, painted)
    assert profile.optimum == family.native(config)  # what a pipeline of such a backbone paints
    assert profile.holds(replace(profile.optimum, height=painted, width=painted))


@pytest.mark.parametrize(
    "profile",
    ["batch=2", "batch=2:4:8", "text=100:200:300", "height=512:512:640,width=768", "height=96:128:192"],
)
@pytest.mark.parametrize("name", ["digits-flux", "tiny-sd3", "tiny-sdxl"])
def test_validation_stays_inside_a_profile_that_was_asked_for(name: str, profile: str) -> None:
    plan = planned(name, "trt-rtx", profile)
    shapes = plan.validation_shapes
    assert len(shapes) == 2
    assert all(plan.profile.holds(plan.source.family.check(plan.source.config, s)) for s in shapes)


def test_a_profile_of_one_shape_leaves_one_shape_to_validate() -> None:
    plan = planned("tiny-flux", "trt-rtx", "batch=1,height=64,width=64,text=128")
    assert plan.validation_shapes == (Shape(1, 64, 64, 128),)


def test_a_shape_outside_the_profile_is_refused_for_engines_alone() -> None:
    artifact = artifact_of(planned("digits-flux", "trt-rtx"))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch"])
    model = helper.make_model(helper.make_graph([], "g", [value], []))
    with pytest.raises(
        UsageError, match=r"512x64 px.* was compiled for \(batch 1, 32x32 px, 128 tokens\) to"
    ):
        shapes_of(artifact, model, ["height=512,width=64"], "trt-rtx")
    assert shapes_of(artifact, model, ["height=512,width=64"])


def test_a_picture_of_an_artifact_for_other_sizes_is_of_its_best_size() -> None:
    plan = planned("tiny-flux", "trt-rtx", "height=512:512:640,width=512:576:640")
    assert usual_size(artifact_of(plan).manifest, 128) == (512, 576)
    plan = replace(plan, targets=(find_target("ort"),))
    assert usual_size(artifact_of(plan).manifest, 128) == (128, 128)
