"""A pipeline with one backbone for each part of its schedule: both lie in one artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffc.artifact.folder import Artifact
from diffc.compile.experts import expert_requests, experts_of
from diffc.compile.request import CompileRequest
from diffc.compile.spine import compile_model
from diffc.errors import DiffcError, UsageError
from diffc.models.sources.locate import locate
from diffc.models.sources.lora_files import parse_lora
from diffc.models.sources.source import HubOptions
from diffc.runtime.load import load
from tools.prove.family_models import make


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wan22-14b", tmp_path_factory.mktemp("models"), num_layers=1)


def test_experts_are_asked_for_by_their_own_folders(pipeline: Path, tmp_path: Path) -> None:
    source = locate(str(pipeline))
    assert experts_of(source) == ("transformer_2",)
    hub = HubOptions(revision="main", subfolder="wan")
    request = CompileRequest(str(pipeline), tmp_path / "out", "fp8", from_checkpoint=tmp_path, hub=hub)
    (tmp_path / "transformer_2").mkdir()
    found = expert_requests(request, source, tmp_path / "out")
    assert set(found) == {"transformer_2"}
    wanted = found["transformer_2"]
    assert (Path(wanted.model), wanted.pipeline) == (pipeline / "transformer_2", str(pipeline))
    assert (wanted.output, wanted.format) == (tmp_path / "out/transformer_2", "fp8")
    assert wanted.from_checkpoint == tmp_path / "transformer_2"
    assert wanted.hub == HubOptions()
    assert expert_requests(wanted, locate(wanted.model), tmp_path) == {}
    assert locate(wanted.model).family.component == "transformer_2"


def test_a_lora_that_names_no_expert_is_refused(pipeline: Path, tmp_path: Path) -> None:
    request = CompileRequest(str(pipeline), tmp_path / "out")
    asked = replace(request, loras=(parse_lora("a.safetensors"),))
    with pytest.raises(UsageError, match="several backbones"):
        expert_requests(asked, locate(str(pipeline)), tmp_path)


@pytest.mark.slow
@pytest.mark.compiles
def test_both_experts_run_from_one_artifact(pipeline: Path, tmp_path: Path) -> None:
    compile_model(CompileRequest(str(pipeline), tmp_path / "out", dtype="float32"))
    assert Artifact.load(tmp_path / "out").manifest["experts"] == ["transformer_2"]
    generator = torch.Generator().manual_seed(3)
    call = {
        "hidden_states": torch.randn(1, 16, 2, 8, 12, generator=generator),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 9, 128, generator=generator),
    }
    for name in ("transformer", "transformer_2"):
        from diffusers import WanTransformer3DModel

        torch_model = WanTransformer3DModel.from_pretrained(pipeline / name)
        with torch.no_grad(), load(tmp_path / "out", component=name) as compiled:
            expected, found = torch_model(**call).sample, compiled(**call).sample
        assert (found - expected).norm() < 1e-5 * expected.norm()
    with pytest.raises(DiffcError, match=r"Known: transformer, transformer_2"):
        load(tmp_path / "out", component="unet")
