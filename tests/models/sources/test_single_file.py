"""Single files: the weights of embedded models under the names of their releases, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.sources.json_files import read_json
from diffc.models.sources.locate import locate
from diffc.tensors import tensor_of
from tests.models.single.releases import backbone, released, save

MODELS = ("tiny-flux", "tiny-sd3", "tiny-sd35", "tiny-sdxl")
# What no shape tells, and what diffusers only notes.
UNTOLD = {"_diffusers_version", "sample_size"}


class TestWeights:
    @pytest.mark.parametrize("model", MODELS)
    def test_a_release_gives_the_same_config_and_the_same_bits(self, model: str, tmp_path: Path) -> None:
        original, state = released(model)
        source = locate(str(save(original, tmp_path / "model.safetensors")))
        assert source.weights.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor_of(source.weights[name]), tensor), name
        config = read_json(backbone(model)[0] / "config.json")
        differing = {key for key, value in config.items() if source.config.get(key) != value}
        assert differing <= UNTOLD
        assert not source.held
        assert not source.parts

    def test_only_rows_of_the_file_are_read(self, tmp_path: Path) -> None:
        source = locate(str(save(released("tiny-flux")[0], tmp_path / "model.safetensors")))
        computed = [name for name, recipe in source.weights.items() if recipe.ops]
        assert computed == ["norm_out.linear.weight", "norm_out.linear.bias"]  # halves change places

    def test_diffusers_names_need_no_converter(self, tmp_path: Path) -> None:
        _, state = backbone("tiny-sd3")
        source = locate(str(save(state, tmp_path / "plain.safetensors", prefix="")))
        assert source.family.name == "sd3"
        name = "transformer_blocks.1.attn.to_k.weight"
        assert torch.equal(tensor_of(source.weights[name]), state[name])

    def test_a_pickled_checkpoint_is_read_without_running_it(self, tmp_path: Path) -> None:
        original, state = released("tiny-sdxl")
        prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
        torch.save({"state_dict": prefixed, "global_step": 7}, tmp_path / "old.ckpt")
        source = locate(str(tmp_path / "old.ckpt"))
        name = "down_blocks.1.resnets.0.conv1.weight"
        assert torch.equal(tensor_of(source.weights[name]), state[name])


class TestParts:
    def test_text_encoders_vae_and_averages_are_named(self, tmp_path: Path) -> None:
        original, _ = released("tiny-sdxl")

        others = (
            "first_stage_model.encoder.conv_in.weight",
            "model_ema.diffusion_modelout0bias",
            "conditioner.embedders.0.transformer.text_model.x.weight",
            "alphas_cumprod",
        )
        whole = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
        whole |= {name: torch.ones(2) for name in others}
        source = locate(str(save(whole, tmp_path / "whole.safetensors", prefix="")))
        assert set(source.parts) == {"VAE", "moving average", "text encoder", "schedule"}

    def test_a_tensor_of_no_part_is_refused(self, tmp_path: Path) -> None:
        whole = {f"model.diffusion_model.{name}": t for name, t in released("tiny-sd3")[0].items()}
        path = save(whole | {"odd.weight": torch.ones(2)}, tmp_path / "odd.safetensors", prefix="")
        with pytest.raises(DiffcError, match=r"tensor 'odd\.weight' of no part"):
            locate(str(path))


class TestRefusals:
    @pytest.mark.parametrize("model", ["tiny-flux", "tiny-sd3", "tiny-sdxl"])
    def test_a_key_that_the_converter_leaves_is_an_error(self, model: str, tmp_path: Path) -> None:
        original, _ = released(model)
        path = save(original | {"surprise.gain": torch.ones(1)}, tmp_path / "more.safetensors")
        with pytest.raises(DiffcError, match=r"no use for 1 of its tensors: surprise\.gain"):
            locate(str(path))

    def test_a_file_that_lacks_a_tensor_is_an_error(self, tmp_path: Path) -> None:
        original, _ = released("tiny-flux")
        del original["single_blocks.1.linear1.weight"]
        with pytest.raises(DiffcError, match=r"cannot read it: KeyError .*linear1"):
            locate(str(save(original, tmp_path / "less.safetensors")))

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("lora_unet_down_blocks_0_attn.lora_up.weight", "holds a LoRA"),
            ("control_model.input_blocks.0.weight", "holds a ControlNet"),
            ("decoder.up.0.block.weight", "holds a VAE alone"),
            ("something.else.weight", "of no backbone that diffc knows (something.else.weight)"),
        ],
    )
    def test_another_file_is_never_taken_for_a_model(self, name: str, said: str, tmp_path: Path) -> None:
        save_arrays({name: np.ones((2, 2), np.float32)}, tmp_path / "other.safetensors")
        with pytest.raises(UnsupportedError) as error:
            locate(str(tmp_path / "other.safetensors"))
        assert said in str(error.value)
        assert error.value.fix

    def test_a_file_that_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DiffcError, match="there is no file"):
            locate(str(tmp_path / "absent.safetensors"))
