"""Models in memory as sources: their weights, what was fused into them, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.sources.fingerprint import hash_values
from diffc.models.sources.live import array_of, live_source, live_tensors, recipe_of_tensor
from diffc.models.sources.locate import locate
from diffc.models.sources.torch_weights import tensor_of
from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.sources import memory_of_its_own
from tests.backbones import backbone_of


@pytest.fixture
def backbone() -> nn.Module:
    return backbone_of("sd3", num_layers=1)


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    with memory_of_its_own():
        yield


class Pipe:
    """A pipeline as far as a source needs one."""

    def __init__(self, backbone: nn.Module, **config: Any) -> None:
        self.components: dict[str, Any] = {"vae": None, "transformer": backbone}
        self.config = config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_those_in_memory(dtype: torch.dtype, backbone: nn.Module) -> None:
    backbone.to(dtype)
    source = live_source(Pipe(backbone))
    assert (source.family.name, source.dtype) == ("sd3", str(dtype).removeprefix("torch."))
    assert source.origin == {"class": "Pipe", "backbone": "SD3Transformer2DModel"}
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor_of(source.weights[name]), tensor)
    with torch.no_grad():
        backbone.proj_out.weight.mul_(2)
    assert live_source(backbone).fingerprint != source.fingerprint


@pytest.mark.parametrize("variant", [False, True])
def test_a_saved_copy_has_the_same_values(variant: bool, backbone: nn.Module, tmp_path: Path) -> None:
    source = live_source(backbone.half())
    backbone.save_pretrained(tmp_path, max_shard_size="1MB" if variant else "10GB")
    saved = locate(str(tmp_path))
    assert saved.fingerprint_like(source.fingerprint) == source.fingerprint == hash_values(saved.weights)
    assert source.fingerprint_like(saved.fingerprint) == ""
    assert saved.fingerprint_like(saved.fingerprint) == saved.fingerprint
    own = {k: v for k, v in saved.config.items() if k != "_name_or_path"}
    assert dict(source.config) == own


def test_any_layout_of_memory_is_read() -> None:
    tensor = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).transpose(0, 1)
    assert np.array_equal(evaluate(recipe_of_tensor(tensor)), tensor.numpy())
    scalar = torch.tensor(2.5, dtype=torch.bfloat16)
    assert float(array_of(scalar)) == 2.5
    # Equal bytes, other types and shapes.
    for zeros in (
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.float64),
    ):
        found = evaluate(recipe_of_tensor(zeros))
        assert (found.shape, found.dtype) == (zeros.shape, zeros.numpy().dtype)


def test_wrappers_are_taken_off(backbone: nn.Module) -> None:
    for wrapped in (torch.compile(backbone), nn.DataParallel(backbone), Pipe(torch.compile(backbone))):
        assert set(live_source(wrapped).weights) == set(backbone.state_dict())


class LoraLinear(nn.Module):
    """A linear layer as PEFT wraps it."""

    def __init__(self, base: nn.Linear, *, merged: bool, active: bool = True):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"style": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"style": nn.Linear(2, base.out_features, bias=False)})
        self.scaling, self.active_adapters = {"style": 0.5}, ["style"] if active else []
        self.merged_adapters = ["style"] if merged else []
        self.disable_adapters = False
        if merged:
            with torch.no_grad():
                base.weight += 0.5 * self.lora_B["style"].weight @ self.lora_A["style"].weight


@pytest.mark.parametrize("state", ["merged", "not active"])
def test_a_merged_lora_is_part_of_the_weights(state: str, backbone: nn.Module) -> None:
    plain = set(backbone.state_dict())
    attention: Any = backbone.transformer_blocks[0].attn
    before = attention.to_q.weight.detach().clone()
    attention.to_q = LoraLinear(attention.to_q, merged=state == "merged", active=state == "merged")
    source = live_source(backbone)
    assert set(source.weights) == plain
    weight = tensor_of(source.weights["transformer_blocks.0.attn.to_q.weight"])
    assert torch.equal(weight, attention.to_q.base_layer.weight)
    assert torch.equal(weight, before) == (state != "merged")


def test_a_lora_beside_the_weights_is_refused(backbone: nn.Module) -> None:
    attention: Any = backbone.transformer_blocks[0].attn
    attention.to_q = LoraLinear(attention.to_q, merged=False)
    with pytest.raises(DiffcError, match=r"LoRA 'style' is loaded and not fused[\s\S]*fuse_lora"):
        live_source(backbone)


def test_what_is_no_backbone_is_refused(backbone: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match="has none of the components"):
        live_source(SimpleNamespace(components={"vae": nn.Linear(1, 1)}))
    with pytest.raises(DiffcError, match="Linear is not a diffusers model"):
        live_source(nn.Linear(1, 1))
    backbone.to("meta")
    with pytest.raises(DiffcError, match="was offloaded"):
        live_tensors(backbone)


def test_weights_are_let_go(backbone: nn.Module) -> None:
    with torch.no_grad():  # recipes are known by their values, and no other test has these
        backbone.proj_out.weight.add_(0.0625)
    with memory_of_its_own():
        recipe = live_source(backbone).weights["proj_out.weight"]
        evaluate(recipe)
    with pytest.raises(PassError, match="is gone"):
        evaluate(recipe)


def test_a_weight_that_was_written_to_is_not_read_for_an_equal_one() -> None:
    first = torch.tensor([1.0, 2.0, 3.0])
    second = first.clone()
    recipe_of_tensor(first)
    recipe = recipe_of_tensor(second)
    first.mul_(2)
    assert evaluate(recipe).tolist() == [1.0, 2.0, 3.0]


def test_the_refiners_pipeline_tells_its_sizes() -> None:
    from diffc.models.embedded import tiny

    unet = backbone_of("sdxl", projection_class_embeddings_input_dim=64 + 5 * tiny.TIME_ID_WIDTH)
    pipe = Pipe(unet, requires_aesthetics_score=True)
    pipe.components = {"unet": unet}
    source = live_source(pipe)
    dims = source.family.input_dims(source.config)
    assert (dims["text_embeds"], dims["time_ids"]) == (("batch", 64), ("batch", 5))
