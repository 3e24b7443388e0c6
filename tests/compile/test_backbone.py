"""One backbone on fake tensors serves a whole compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest

from diffc.compile.request import CompileRequest
from diffc.compile.spine import compile_model
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import locate
from diffc.quantize.convert import enabled_quantizers, insert_quantizers
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import DEFAULT_OPTIONS


@pytest.mark.compiles
@pytest.mark.usefixtures("fresh_traces")
def test_a_compile_makes_one_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To check the weights, resolve a cache plan, calibrate, trace, and find the shapes of what is kept."""
    made = []
    original = diffusers.SD3Transformer2DModel.from_config

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(diffusers.SD3Transformer2DModel, "from_config", counted)
    request = CompileRequest(
        "tiny-sd3", tmp_path / "out", "mxfp8", cache_plan="blocks:first=0", skip_validation=True
    )
    done = compile_model(request)
    assert done.artifact.manifest["cache"]["models"]
    assert len(made) == 1


def test_quantizers_in_a_copy_leave_what_is_lent_alone() -> None:
    backbone = FakeBackbone(locate("tiny-sd3"), "float16")
    copy = backbone.copy()
    with backbone.mode:
        insert_quantizers(copy, FORMATS["mxfp8"], backbone.source.family.unquantized, DEFAULT_OPTIONS)
    assert enabled_quantizers(copy)
    assert not enabled_quantizers(backbone.module)
    ours, theirs = dict(copy.named_parameters()), dict(backbone.module.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
