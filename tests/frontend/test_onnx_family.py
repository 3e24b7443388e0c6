"""Which family an ONNX file is of, and what config.json its graph tells."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from diffc.backends.target import find_target
from diffc.compile.import_profile import profile_of, shape_profile
from diffc.errors import DiffcError
from diffc.frontend.onnx_family import read_interface
from diffc.models.spec import Shape

SD3 = {
    "hidden_states": ["batch_size", 16, "height", "width"],
    "encoder_hidden_states": ["batch_size", "sequence_length", 4096],
    "pooled_projections": ["batch_size", 2048],
    "timestep": ["steps"],
}
SDXL = {
    "sample": ["batch_size", 4, "height", "width"],
    "timestep": ["steps"],
    "encoder_hidden_states": ["batch_size", "sequence_length", 2048],
    "text_embeds": ["batch_size", 1280],
    "time_ids": ["batch_size", 6],
}
FLUX = {
    "hidden_states": ["batch_size", "latent_dim", 64],
    "encoder_hidden_states": ["batch_size", 512, 4096],
    "pooled_projections": ["batch_size", 768],
    "timestep": ["batch_size"],
    "img_ids": ["latent_dim", 3],
    "txt_ids": [512, 3],
    "guidance": ["batch_size"],
}
PATH = Path("nowhere") / "model.onnx"


def model(
    inputs: dict[str, list[str | int]], output: list[str | int], **weights: list[int]
) -> onnx.ModelProto:
    """A model with that interface; it has weights, and no nodes."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, d) for n, d in inputs.items()]
    out = helper.make_tensor_value_info("latent", TensorProto.FLOAT16, output)
    held = [onnx.TensorProto(name=n.replace("__", "."), dims=d) for n, d in weights.items()]
    return helper.make_model(helper.make_graph([], "g", values, [out], held))


def test_sd3_tells_its_widths_and_where_an_image_ends() -> None:
    weights = {"pos_embed__pos_embed": [1, 192 * 192, 1536], "pos_embed__proj__weight": [1536, 16, 2, 2]}
    found = read_interface(model(SD3, ["batch_size", 16, "height", "width"], **weights), PATH)
    assert found is not None
    assert found.family.name == "sd3"
    assert found.config["joint_attention_dim"] == 4096
    assert found.config["pos_embed_max_size"] == 192
    assert found.dims["steps"] == "batch"
    assert found.inputs["timestep"] == "timestep"


def test_sdxl_tells_how_wide_its_sizes_are_embedded_and_how_many_levels_it_has() -> None:
    levels = {f"down_blocks__{n}__resnets__0__conv1__weight": [w, w, 3, 3] for n, w in enumerate((320, 640))}
    embedding = {"add_embedding__linear_1__weight": [1280, 1280 + 6 * 128]}
    found = read_interface(model(SDXL, ["batch_size", 4, "height", "width"], **levels, **embedding), PATH)
    assert found is not None
    assert found.config["addition_time_embed_dim"] == 128
    assert found.config["block_out_channels"] == [320, 640]
    assert found.family.pixel_multiple(found.config) == 16


def test_flux_with_and_without_guidance_has_its_text_fixed() -> None:
    for inputs, guided in ((FLUX, True), ({k: v for k, v in FLUX.items() if k != "guidance"}, False)):
        found = read_interface(model(inputs, ["batch_size", "latent_dim", 64]), PATH)
        assert found is not None
        assert found.config["guidance_embeds"] is guided
        assert found.fixed == {"text": 512}
        profile = shape_profile(found, model(inputs, []), "batch_size=1,latent_dim=1024:4096:6144")
        assert profile.optimum == Shape(1, 1024, 1024, 512)
        assert (profile.minimum.height, profile.maximum.width) == (512, 1536)


def test_inputs_with_the_familys_names_may_come_in_any_order() -> None:
    inputs = {
        name: SD3[name]
        for name in ("timestep", "pooled_projections", "hidden_states", "encoder_hidden_states")
    }
    found = read_interface(model(inputs, ["batch_size", 16, "height", "width"]), PATH)
    assert found is not None
    assert found.inputs == {name: name for name in SD3}


@pytest.mark.parametrize(
    "inputs",
    [
        {k: v for k, v in SDXL.items() if k not in ("text_embeds", "time_ids")},  # Stable Diffusion 1.5
        SD3 | {"hidden_states": ["batch_size", "num_channels", "height", "width"]},  # no width is known
        SD3 | {"pooled_projections": ["height", 2048]},  # the same axis twice
        SDXL | {"time_ids": ["batch_size", 5]},  # the refiner
    ],
    ids=["sd15", "no-width", "contradiction", "refiner"],
)
def test_what_is_no_familys_interface_has_none(inputs: dict[str, list[str | int]]) -> None:
    assert read_interface(model(inputs, ["batch_size", 4, "height", "width"]), PATH) is None


def test_a_config_beside_the_file_is_taken_where_it_fits(tmp_path: Path) -> None:
    exported = model(SD3, ["batch_size", 16, "height", "width"])
    config = {"_class_name": "SD3Transformer2DModel", "sample_size": 64, "patch_size": 2, "in_channels": 16}
    config |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 96}
    for width, size in ((4096, 64), (2048, 128)):
        text = json.dumps(config | {"joint_attention_dim": width})
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        found = read_interface(exported, tmp_path / "model.onnx")
        assert found is not None
        assert found.config["sample_size"] == size


def test_the_profile_is_asked_once_with_what_is_usual() -> None:
    exported = model(SD3, ["batch_size", 16, "height", "width"])
    found = read_interface(exported, PATH)
    with pytest.raises(DiffcError) as refused:
        profile_of(exported, "", [find_target("trt-rtx")], found)
    fix = refused.value.fix
    assert "batch_size=1:2:4,height=64:128:192,width=64:128:192,sequence_length=83:333:666" in fix
    assert "512x512 px" in fix
    given = fix.partition("--profile ")[2].partition(",  ")[0].partition(", which")[0].strip("'")
    (profile,) = profile_of(exported, given, [find_target("trt-rtx")], found)
    assert profile.inputs["timestep"].max == (4,)
