"""Calibration layer by layer on random inputs: ModelOpt's result on the whole model, without its weights in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffc.compile import calibration
from diffc.compile.calibration import SYNTHETIC_TEXT
from diffc.compile.plan import Plan, check
from diffc.compile.quantize import calibrated
from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sources.backbone import FakeBackbone, load_backbone
from diffc.models.spec import Shape
from diffc.progress import Silent
from diffc.quantize import synthetic
from diffc.quantize.calibrate import _collect, _finish, algorithm_of
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import insert_quantizers
from diffc.quantize.options import QuantOptions
from diffc.quantize.scaling import low_rank

CASES = [
    ("tiny-sd3", "fp8", QuantOptions(mha=True)),
    ("tiny-sd3", "int8_smoothquant", QuantOptions(alpha=0.6)),
    pytest.param("tiny-flux", "w4a8_awq", QuantOptions(level=2.0), marks=pytest.mark.slow),
    pytest.param("tiny-sdxl", "fp8", QuantOptions(), marks=pytest.mark.slow),
]


def plan_of(model: str, format: str, options: QuantOptions, folder: Path, **changed: Any) -> Plan:
    request = CompileRequest(model, folder / "out", format, options=options, calibrate="synthetic")
    return check(replace(request, batch_size=2, image_size=64, **changed))


def whole(plan: Plan) -> Checkpoint:
    """ModelOpt on the whole model and the same inputs."""
    model = load_backbone(plan.source, torch.float32)
    insert_quantizers(model, plan.format, plan.source.family.unquantized, plan.request.options)
    shape = Shape(2, 64, 64, SYNTHETIC_TEXT)
    values = random_inputs(plan.source.family, plan.source.config, shape, dtype=torch.float32, seed=0)
    kwargs = forward_kwargs(plan.source.family, plan.source.config, values)
    algorithm = algorithm_of(plan.format, plan.request.options)
    _collect(model, algorithm, lambda m: m(**kwargs, return_dict=False))
    _finish(model)
    return Checkpoint.from_backbone(model, family=plan.source.family.name, format=plan.format.name)


@pytest.mark.parametrize(("model", "format", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_layer_by_layer_is_modelopt_on_the_whole_model(
    model: str, format: str, options: QuantOptions, tmp_path: Path
) -> None:
    plan = plan_of(model, format, options, tmp_path)
    ours, theirs = calibrated(plan, FakeBackbone(plan.source, plan.dtype), Silent()), whole(plan)
    assert ours.settings == theirs.settings
    assert ours.amax.keys() == theirs.amax.keys()
    assert ours.scaling.keys() == theirs.scaling.keys()
    for name, amax in theirs.amax.items():
        np.testing.assert_allclose(
            ours.amax[name], amax, rtol=1 / 64, err_msg=name
        )  # a portable step at most
    equal = [np.array_equal(ours.amax[name], amax) for name, amax in theirs.amax.items()]
    # Float32 sums differ in the last bit, which may decide on a portable step, of factors and of what they scale.
    assert np.mean(equal) > (0.85 if theirs.scaling else 0.98)
    for name, value in theirs.scaling.items():
        np.testing.assert_allclose(ours.scaling[name], value, rtol=1 / 64, err_msg=name)


def test_a_layer_that_got_other_inputs_would_be_noticed(tmp_path: Path) -> None:
    plan = plan_of("tiny-sd3", "fp8", QuantOptions(), tmp_path)
    other = replace(plan, request=replace(plan.request, seed=7))
    ours, theirs = calibrated(other, FakeBackbone(other.source, other.dtype), Silent()), whole(plan)
    inputs = [name for name in theirs.amax if name.endswith("input_quantizer")]
    assert np.mean([np.array_equal(ours.amax[name], theirs.amax[name]) for name in inputs]) < 0.5


def test_no_more_than_a_layer_of_weights_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("tiny-sd3", "fp8", QuantOptions(), tmp_path)
    seen: list[int] = []
    original = synthetic._calibrate_layer

    def watched(path: str, layer: Any, *rest: Any) -> None:
        seen.append(sum(p.numel() for p in models[0].parameters() if p.device.type != "meta"))
        original(path, layer, *rest)

    models: list[Any] = []
    run = synthetic.calibrate_synthetic

    def kept(empty: Any, *rest: Any) -> Any:
        models.append(empty)
        return run(empty, *rest)

    monkeypatch.setattr(synthetic, "_calibrate_layer", watched)
    monkeypatch.setattr(calibration, "calibrate_synthetic", kept)
    calibrated(plan, FakeBackbone(plan.source, plan.dtype), Silent())
    total = sum(p.numel() for p in models[0].parameters())
    assert len(seen) == 40
    assert max(seen) < total / 20


def test_a_backbone_alone_needs_no_pipeline(tmp_path: Path) -> None:
    backbone = materialize("tiny-sd3") / "transformer"
    request = CompileRequest(str(backbone), tmp_path / "out", "fp8")
    with pytest.raises(DiffcError, match="--calibrate synthetic"):
        check(request)
    assert check(replace(request, calibrate="synthetic")).format.name == "fp8"
    with pytest.raises(DiffcError, match="unknown way to calibrate 'guess'"):
        check(replace(request, calibrate="guess"))


def test_the_fast_decomposition_takes_what_the_whole_one_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.logspace(1, -2, 300)
    left, _ = torch.linalg.qr(torch.randn(400, 300, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(500, 300, generator=generator))
    weight = left @ torch.diag(values) @ right.T
    fast, again = low_rank(weight, 32), low_rank(weight, 32)
    rest = torch.linalg.norm(weight - fast[0] @ fast[1])
    assert rest <= 1.01 * torch.linalg.norm(values[32:])  # the best that rank 32 can do (Eckart and Young)
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))
