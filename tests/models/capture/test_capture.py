"""Interfaces read off real pipelines of diffusers, made from configurations: nothing is traced here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffc.errors import UsageError
from diffc.models.capture.capture import capture
from diffc.models.captured import captured_family
from diffc.models.inputs import forward_kwargs, named_inputs, random_inputs
from diffc.models.interface import Interface
from diffc.models.sources.locate import locate
from diffc.models.spec import Shape
from tools.prove.family_models import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_an_image_class(folder: Path) -> None:
    found = capture(make("sd15", folder), "unet")
    assert [i.name for i in found.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert found.inputs[0].dims == ("batch", 4, "height", "width")
    assert found.inputs[2].dims == ("batch", "text", 64)
    assert (found.batch, found.multiple, found.frames) == (2, 16, None)
    assert found.native == {"batch": 2, "height": 128, "width": 128, "frames": 1, "text": 77}
    assert found.outputs[0].dims == ("batch", 4, "height", "width")


def test_a_video_class_whose_call_has_numbers(folder: Path) -> None:
    place = make("ltx", folder)
    found = capture(place, "transformer")
    numbers = {i.name: i.dims for i in found.inputs if i.kind == "size"}
    assert numbers == {"num_frames": ("frames",), "height": ("height",), "width": ("width",)}
    assert found.frames == (8, 1)
    assert dict(found.constants) == {
        ("rope_interpolation_scale", 0): 0.32,
        ("rope_interpolation_scale", 1): 32,
        ("rope_interpolation_scale", 2): 32,
    }
    source = locate(str(place))
    family, shape = source.family, Shape(2, 96, 160, 20, 25)
    assert family.input_shapes(source.config, shape)["hidden_states"] == (2, 3 * 5 * 4, 128)
    values = random_inputs(family, source.config, shape, dtype=torch.float32, seed=1)
    kwargs = forward_kwargs(family, source.config, values)
    assert (kwargs["num_frames"], kwargs["height"], kwargs["width"]) == (4, 3, 5)
    assert kwargs["rope_interpolation_scale"] == (0.32, 32, 32)
    mask = kwargs["encoder_attention_mask"]
    assert mask.dtype == torch.bool
    assert 0 < int(mask.sum()) < mask.numel()
    with pytest.raises(UsageError, match="26 frames do not fit ltx"):
        family.check(source.config, Shape(1, 64, 64, 20, 26))


def test_an_interface_survives_json(folder: Path) -> None:
    found = capture(make("ltx", folder), "transformer")
    again = Interface.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    family = captured_family(again, {"num_layers": 4})
    assert family.name == "ltx"
    assert family.output_dims({}) == ("batch", "video", 128)


def test_a_class_that_takes_lists(folder: Path) -> None:
    place = make("z-image", folder)
    found = capture(place, "transformer")
    dims = {item.name: item.dims for item in found.inputs}
    assert dims["x"] == ("batch", 16, 1, "height", "width")
    assert dims["cap_feats"][::2] == ("batch", 128)
    assert (dims["cap_feats_lengths"], found.lists) == (("batch",), {"x": False, "cap_feats": True})
    source = locate(str(place))
    family = source.family
    values = random_inputs(family, source.config, Shape(3, 64, 96, 20), dtype=torch.float32, seed=2)
    whole = forward_kwargs(family, source.config, values, batched=True)
    lists = forward_kwargs(family, source.config, values)
    lengths = values["cap_feats_lengths"].tolist()
    assert [len(item) for item in lists["cap_feats"]] == lengths
    assert len(set(lengths)) > 1
    again = named_inputs(family, source.config, (lists["x"], lists["t"], lists["cap_feats"]), {})
    assert torch.equal(again["x"], whole["x"])
    kept = torch.arange(whole["cap_feats"].shape[1]) < values["cap_feats_lengths"][:, None]
    assert torch.equal(again["cap_feats"], whole["cap_feats"] * kept[..., None])
    assert again["cap_feats_lengths"].tolist() == lengths


def test_a_class_that_counts_tokens_in_its_mask(folder: Path) -> None:
    found = capture(make("lumina2", folder), "transformer")
    masks = {item.name: item.dims for item in found.inputs if item.kind == "mask"}
    assert masks == {"encoder_attention_mask": ("batch", "text")}
    assert found.outputs[0].dims == ("batch", 16, "height", "width")
