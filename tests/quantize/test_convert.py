"""Where quantizers go: into layers with a weight, and nowhere else."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.errors import DiffcError
from diffc.models.embedded import tiny
from diffc.models.embedded.catalogue import materialize
from diffc.models.registry import FAMILIES
from diffc.quantize.convert import enabled_quantizers, hidden_matrices, insert_quantizers
from diffc.quantize.formats import FORMATS, find_format

BACKBONES = {
    "sd3": (diffusers.SD3Transformer2DModel, tiny.SD35),
    "flux": (diffusers.FluxTransformer2DModel, tiny.FLUX),
    "sdxl": (diffusers.UNet2DConditionModel, tiny.SDXL),
}


LAYERS = {
    "sd3": ("transformer_blocks.0.attn.to_q", "context_embedder", "transformer_blocks.0.norm1.norm"),
    "flux": ("single_transformer_blocks.0.proj_out", "proj_out", "transformer_blocks.0.norm1.norm"),
    "sdxl": ("down_blocks.0.resnets.0.conv1", "conv_in", "mid_block.attentions.0.transformer_blocks.0.norm1"),
}


def backbone_of(family: str) -> nn.Module:
    torch.manual_seed(3)
    cls, config = BACKBONES[family]
    return cls(**config).eval()


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_quantizes_linear_and_conv_only(family: str, name: str) -> None:
    backbone, pattern = backbone_of(family), FAMILIES[family].unquantized
    expected = {
        f"{path}.{kind}_quantizer"
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not re.match(pattern, path)
        for kind in ("input", "weight")
    }
    insert_quantizers(backbone, FORMATS[name], pattern)
    assert set(enabled_quantizers(backbone)) == expected
    quantized, kept, norm = LAYERS[family]
    assert f"{quantized}.input_quantizer" in expected
    assert isinstance(backbone.get_submodule(norm), nn.LayerNorm)
    assert not [path for path in expected if path.startswith((f"{kept}.", f"{norm}."))]


@pytest.mark.parametrize("family", BACKBONES)
def test_norms_and_attention_keep_their_class(family: str) -> None:
    backbone = backbone_of(family)
    kinds = {
        path: type(module)
        for path, module in backbone.named_modules()
        if not isinstance(module, nn.Linear | nn.Conv2d)
    }
    insert_quantizers(backbone, FORMATS["fp8"], FAMILIES[family].unquantized)
    assert {path: type(backbone.get_submodule(path)) for path in kinds} == kinds


@pytest.mark.parametrize("family", BACKBONES)
def test_fake_backbone_gets_the_same_quantizers(family: str) -> None:
    real = backbone_of(family)
    with FakeTensorMode():
        fake = backbone_of(family)
        insert_quantizers(fake, FORMATS["int8"], FAMILIES[family].unquantized)
    insert_quantizers(real, FORMATS["int8"], FAMILIES[family].unquantized)
    attributes = [
        {path: (q.num_bits, q.axis, q.block_sizes) for path, q in enabled_quantizers(b).items()}
        for b in (real, fake)
    ]
    assert attributes[0] == attributes[1]


def test_format_none_changes_nothing() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    insert_quantizers(layer, FORMATS["none"], "$^")
    assert type(layer[0]) is nn.Linear


class Experts(nn.Module):
    """A linear layer, a convolution of volumes, and experts whose matrices are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.volume = nn.Linear(64, 64), nn.Conv3d(4, 8, 3)
        self.experts, self.table = nn.Parameter(torch.ones(4, 64, 96)), nn.Parameter(torch.ones(6, 64))
        self.pos_embed = nn.Parameter(torch.ones(1, 128, 64))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_convolutions_of_volumes_are_quantized(name: str) -> None:
    backbone = Experts()
    insert_quantizers(backbone, FORMATS[name], "$^")
    assert {path.partition(".")[0] for path in enabled_quantizers(backbone)} == {"proj", "volume"}


def test_matrices_in_no_layer_are_named() -> None:
    backbone = nn.Sequential(Experts(), nn.Embedding(50, 64), nn.LayerNorm([64, 64]))
    assert hidden_matrices(backbone) == {"0.experts": 4 * 64 * 96}


@pytest.mark.parametrize("family", BACKBONES)
def test_our_own_families_hide_nothing(family: str) -> None:
    assert hidden_matrices(backbone_of(family)) == {}


def test_insertion_refuses_what_makes_no_sense() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(DiffcError, match=r"quantizes no layer.*\n.*--format none"):
        insert_quantizers(layer, FORMATS["fp8"], ".*")
    insert_quantizers(layer, FORMATS["fp8"], "$^")
    with pytest.raises(DiffcError, match="holds quantizers already"):
        insert_quantizers(layer, FORMATS["fp8"], "$^")
    with pytest.raises(DiffcError, match=r"unknown format 'int9'\. Known: none, int8, \S+ fp8"):
        find_format("int9")


def pipeline_of(model: str) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(materialize(model), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd3() -> diffusers.DiffusionPipeline:
    """A pipeline whose transformer every test below replaces."""
    return pipeline_of("tiny-sd3")
