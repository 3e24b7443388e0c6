"""Weights that training has changed: told from those that were only cast, carried, and never scaled again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import modelopt.torch.opt as mto
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.errors import DiffcError
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of
from diffc.quantize.trained import changed_weights
from diffc.tensors import recipe_of_tensor, tensor_of
from passes.weights.recipe import Recipe
from passes.weights.safetensors_writer import write_safetensors
from tests.backbones import backbone_of, forward
from tests.quantize.test_checkpoint import calibrated
from tests.quantize.test_modelopt_file import PRESETS, modelopt_model, preset


def recipes(module: nn.Module) -> dict[str, Recipe]:
    """The tensors of a module by name."""
    return {name: recipe_of_tensor(tensor) for name, tensor in module.state_dict().items()}


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_cast_is_not_a_change_and_the_last_bit_is(dtype: torch.dtype) -> None:
    own = {name: values(size, 3) for name, size in (("a", 5), ("b", 7))}
    theirs = {name: tensor.to(dtype) for name, tensor in own.items()}
    as_recipes = {name: recipe_of_tensor(tensor) for name, tensor in own.items()}
    assert not changed_weights({n: recipe_of_tensor(t) for n, t in theirs.items()}, as_recipes, "f")
    theirs["b"] = theirs["b"].clone()
    theirs["b"][6, 2] = torch.nextafter(theirs["b"][6, 2], torch.tensor(9.0, dtype=dtype))
    changed = changed_weights({n: recipe_of_tensor(t) for n, t in theirs.items()}, as_recipes, "f")
    assert changed.keys() == {"b"}
    assert torch.equal(tensor_of(changed["b"]), theirs["b"])
    assert changed_weights({"c": recipe_of_tensor(own["a"])}, as_recipes, "f").keys() == {"c"}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_training_that_diverged_is_refused(wrong: float) -> None:
    tensor = values(4, 4)
    own = recipe_of_tensor(tensor.clone())
    tensor[3, 1] = wrong
    with pytest.raises(DiffcError, match=r"x\.pt: tensor 'w' .* holds (NaN|infinity)[\s\S]*lower rate"):
        changed_weights({"w": recipe_of_tensor(tensor)}, {"w": own}, "x.pt")


@pytest.mark.parametrize("format", ["int8", "w4a8_awq", "nvfp4_svdquant"])
def test_a_trained_file_of_modelopt_is_taken_with_its_weights(format: str, tmp_path: Path) -> None:
    """Every weight times 1.5, as after a training: they used to be dropped without a word."""
    config = PRESETS.get(format) or preset(format)
    theirs = modelopt_model("flux", config)
    for module in theirs.modules():  # norms are quantized by accident in ModelOpt's presets
        if isinstance(module, nn.LayerNorm) and hasattr(module, "input_quantizer"):
            module.input_quantizer.disable()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.5)
    mto.save(theirs, tmp_path / "b.pt")
    own = recipes(backbone_of("flux"))
    with FakeTensorMode():
        fake = backbone_of("flux")
    read = Checkpoint.from_modelopt(tmp_path / "b.pt", fake, family="flux", weights=own)
    unchanged = {name for name, recipe in own.items() if not tensor_of(recipe).any()}  # biases of zero
    assert read.weights.keys() == own.keys() - unchanged
    read.save(tmp_path / "c")
    loaded = Checkpoint.load(tmp_path / "c")
    ours = backbone_of("flux")
    loaded.apply(ours, "flux")
    quantized = {layer_of(name) for name in loaded.settings}
    for name, parameter in ours.named_parameters():
        layer = name.rpartition(".")[0]
        scaled = hasattr(getattr(theirs.get_submodule(layer), "input_quantizer", None), "_pre_quant_scale")
        # ModelOpt's scripts scale all layers and then switch some off, where diffc has the product of both.
        if layer in quantized or not scaled:
            assert torch.equal(parameter, theirs.get_parameter(name)), name
    found, expected = forward(ours, "flux"), forward(theirs, "flux")
    # amax become portable: a grid up to 1/128 wider moves values by a part of a step.
    assert float((found - expected).norm() / expected.norm()) < 0.03
    plain = backbone_of("flux")
    replace(loaded, weights={}).apply(plain, "flux")
    assert float((forward(plain, "flux") - expected).norm() / expected.norm()) > 0.1


def test_an_untrained_file_carries_no_weight(tmp_path: Path) -> None:
    theirs = modelopt_model("sd3", preset("fp8"))
    mto.save(theirs.to(torch.bfloat16), tmp_path / "b.pt")
    read = Checkpoint.from_modelopt(
        tmp_path / "b.pt", backbone_of("sd3"), family="sd3", weights=recipes(backbone_of("sd3"))
    )
    assert not read.weights
    read.save(tmp_path / "c")
    assert '"schema": 1' in (tmp_path / "c" / "checkpoint.json").read_text(encoding="utf-8")
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"checkpoint.json", "quantizers.safetensors"}


@pytest.fixture(scope="module")
def trained() -> Checkpoint:
    made = Checkpoint.from_backbone(calibrated("flux", "int8"), family="flux", format="int8")
    name = "transformer_blocks.0.attn.to_q.weight"
    weight = backbone_of("flux").get_parameter(name)
    return replace(made, weights={name: recipe_of_tensor((weight * 1.5).to(torch.bfloat16))})


def test_a_folder_with_weights_has_schema_2_and_equal_bytes(trained: Checkpoint, tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained.save(tmp_path / name)
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert files == {"checkpoint.json", "quantizers.safetensors", "weights.safetensors"}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert '"schema": 2' in (tmp_path / "a" / "checkpoint.json").read_text(encoding="utf-8")
    (stored,) = load_file(tmp_path / "a" / "weights.safetensors").items()
    assert stored[1].dtype == torch.bfloat16
    (key,) = trained.weights
    assert stored[0] == key
    assert torch.equal(stored[1], tensor_of(trained.weights[key]))


def test_damage_of_the_weights_is_told(trained: Checkpoint, tmp_path: Path) -> None:
    trained.save(tmp_path / "c")
    file = tmp_path / "c" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DiffcError, match=r"damaged: weights\.safetensors is not the file"):
        Checkpoint.load(tmp_path / "c")
    file.unlink()
    with pytest.raises(DiffcError, match=r"weights\.safetensors cannot be read"):
        Checkpoint.load(tmp_path / "c")


def test_weights_that_the_model_lacks_are_named(trained: Checkpoint) -> None:
    (recipe,) = trained.weights.values()
    backbone = backbone_of("flux")
    strange = replace(trained, weights={"gone.weight": recipe})
    with pytest.raises(DiffcError, match=r"carries 'gone\.weight' of shape .* has none"):
        strange.apply(backbone, "flux")
    narrow = replace(trained, weights={next(iter(trained.weights)): recipe_of_tensor(values(2, 2))})
    with pytest.raises(DiffcError, match=r"of shape \[2, 2\]"):
        narrow.check(backbone, "flux")


def test_written_tensors_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    tensors = {"b": values(3, 5), "a": values(7, dtype=torch.bfloat16), "s": values(1)[0], "e": values(0, 4)}
    write_safetensors(tmp_path / "ours", {name: recipe_of_tensor(t) for name, t in tensors.items()})
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
