"""A ModelOpt file whose weights were trained: these are compiled, and torch has them in the comparison."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch

from diffc.compile.spine import CompileRequest, compile_model
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sources.backbone import load_backbone
from diffc.models.sources.locate import locate
from diffc.models.spec import Shape
from diffc.quantize.checkpoint import Checkpoint
from tests.quantize.test_modelopt_file import preset

FACTOR = 1.5


@pytest.mark.compiles
def test_trained_weights_of_modelopt_are_compiled(tmp_path: Path) -> None:
    source = locate("tiny-sd3")
    theirs = load_backbone(source, torch.float32)
    drawn = random_inputs(source.family, source.config, Shape(2, 64, 64, 12), dtype=torch.float32, seed=0)
    with torch.no_grad(), redirect_stdout(StringIO()):
        mtq.quantize(
            theirs, preset("int8"), lambda m: m(**forward_kwargs(source.family, source.config, drawn))
        )
        for parameter in theirs.parameters():
            parameter.mul_(FACTOR)
    mto.save(theirs, tmp_path / "trained.pt")
    output = tmp_path / "artifact"
    request = CompileRequest("tiny-sd3", output, "int8", ("ort",), from_checkpoint=tmp_path / "trained.pt")
    assert all(report.passed for report in compile_model(request).validation)
    assert Checkpoint.load(output / "checkpoint").weights.keys() <= source.weights.keys()
    stored = {t.name: t for t in onnx.load(output / "model.onnx").graph.initializer}
    name = "transformer_blocks.0.norm1.linear.bias"
    values = onnx.numpy_helper.to_array(stored[name]).astype(np.float32)
    own = load_backbone(source, torch.float32).get_parameter(name).detach()
    np.testing.assert_allclose(values, (own * FACTOR).numpy(), rtol=1e-3)
    assert float(own.abs().max()) > 1e-3
