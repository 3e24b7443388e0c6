"""Text encoders and VAE of a file: put into the pipeline bit for bit, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffc.errors import DiffcError, UsageError
from diffc.models.embedded.catalogue import materialize
from diffc.models.sources.around import with_pipeline
from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.locate import locate
from diffc.models.sources.pipelines import open_pipeline
from tests.models.single.releases import State, released, save

CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def component(name: str) -> State:
    """The weights of a component of tiny-sdxl, changed so that they are not the pipeline's own."""
    file = next((materialize("tiny-sdxl") / name).glob("*.safetensors"))
    return {key: tensor * 1.5 for key, tensor in load_file(file).items() if tensor.is_floating_point()}


def open_clip(state: State) -> State:
    """The names of OpenCLIP: q, k and v joined, the projection turned."""
    prefix, made = "conditioner.embedders.1.model.", State()
    for key, tensor in state.items():
        name = key.removeprefix("text_model.")
        if m := re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name):
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            made[f"{prefix}transformer.resblocks.{m[1]}.attn.in_proj_{m[2]}"] = torch.cat(parts)
        elif m := re.match(r"encoder\.layers\.(\d+)\.(?!self_attn\.[kv])(.*)\.(\w+)$", name):
            made[f"{prefix}transformer.resblocks.{m[1]}.{CLIP[m[2]]}.{m[3]}"] = tensor
        elif name == "text_projection.weight":
            made[f"{prefix}text_projection"] = tensor.T.contiguous()
    made[f"{prefix}positional_embedding"] = found(state, "position_embedding.weight")
    made[f"{prefix}token_embedding.weight"] = found(state, "token_embedding.weight")
    for leaf in ("weight", "bias"):
        made[f"{prefix}ln_final.{leaf}"] = found(state, f"final_layer_norm.{leaf}")
    return made


def found(state: State, end: str) -> torch.Tensor:
    return next(tensor for key, tensor in state.items() if key.endswith(end))


def latent(state: State) -> State:
    """The names of the original VAE: levels of the decoder the other way round, attention as 1 x 1 convolutions."""
    levels = 1 + max(int(m[1]) for key in state if (m := re.match(r"decoder\.up_blocks\.(\d+)", key)))
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    made = State()
    for key, tensor in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if m := re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(\w+)$", name):
            name = f"{m[1]}mid.attn_1.{attention[m[2]]}.{m[3]}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        made[f"first_stage_model.{name}"] = tensor
    return made


def whole(path: Path, *parts: State) -> Path:
    """tiny-sdxl as one file with `parts` beside the backbone."""
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in released("tiny-sdxl")[0].items()}
    for part in parts:
        state |= part
    return save(state, path / "whole.safetensors", prefix="")


def test_a_whole_file_gives_its_own_encoders_and_vae(tmp_path: Path) -> None:
    first, second, vae = component("text_encoder"), component("text_encoder_2"), component("vae")
    plain = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
    source = locate(str(whole(tmp_path, plain, open_clip(second), latent(vae))))
    with quiet_libraries():
        pipe = open_pipeline(with_pipeline(source, "tiny-sdxl"), dtype=torch.float32, fix="")
    wanted = {"text_encoder": first, "text_encoder_2": second, "vae": vae, "unet": released("tiny-sdxl")[1]}
    for name, weights in wanted.items():
        own = pipe.components[name].state_dict()
        for key, tensor in weights.items():
            assert torch.equal(own[key], tensor.float()), f"{name} {key}"


def test_an_encoder_of_another_base_is_refused(tmp_path: Path) -> None:
    other = {"text_encoders.t5xxl.transformer.shared.weight": torch.ones(3, 4)}
    source = locate(str(whole(tmp_path, other)))
    with quiet_libraries(), pytest.raises(DiffcError, match=r"t5xxl\.transformer, which fits no component"):
        open_pipeline(with_pipeline(source, "tiny-sdxl"), dtype=torch.float32, fix="")


def test_a_pipeline_of_another_family_is_refused(tmp_path: Path) -> None:
    source = locate(str(whole(tmp_path)))
    with pytest.raises(UsageError, match="is a pipeline of sd3"):
        with_pipeline(source, "tiny-sd3")
