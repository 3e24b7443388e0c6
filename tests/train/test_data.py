"""Pictures with prompts: what a folder may be, what is said of one that is not, and what a batch holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffc.errors import DiffcError
from diffc.models.inputs import forward_kwargs
from diffc.models.sources.pipelines import open_pipeline
from diffc.train.capture import call_arguments
from diffc.train.data import Pictures, encode_pictures, read_pictures
from diffc.train.noising import Noising
from diffc.train.request import TrainRequest, check


def picture(path: Path, size: tuple[int, int] = (40, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)


def test_a_folder_with_a_text_file_beside_each_picture(tmp_path: Path) -> None:
    for name in ("b", "a"):
        picture(tmp_path / "x" / f"{name}.png")
        (tmp_path / "x" / f"{name}.txt").write_text(f"prompt {name} é\n", encoding="utf-8")
    found = read_pictures(str(tmp_path), 16, 0)
    assert [p.prompt for p in found] == ["prompt a é", "prompt b é"]
    pixels = found[0].pixels()
    assert pixels.shape == (3, 16, 16)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    middle = np.asarray(Image.open(tmp_path / "x" / "a.png").crop((10, 0, 30, 20)).resize((16, 16), 3))
    assert np.allclose(pixels.permute(1, 2, 0).numpy() * 255, middle, atol=1)
    (tmp_path / "x" / "b.txt").unlink()
    with pytest.raises(DiffcError, match=r"b\.png has no prompt: there is no b\.txt"):
        read_pictures(str(tmp_path), 16, 0)


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "one.png")
    rows = [
        {"file_name": "train/one.png", "text": "first"},
        {"file_name": "train/one.png", "prompt": "second"},
    ]
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert [p.prompt for p in read_pictures(str(tmp_path), 16, 0)] == ["first", "second"]
    file.write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(DiffcError, match=r"metadata\.jsonl, line 1"):
        read_pictures(str(tmp_path), 16, 0)


def test_what_is_no_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="has no picture"):
        read_pictures(str(tmp_path), 16, 0)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(DiffcError, match=r"cannot read the picture .*a\.png"):
        read_pictures(str(tmp_path), 16, 0)[0].pixels()


def test_a_batch_has_each_rows_own_prompt_and_time() -> None:
    latents = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 4, 4).clone()
    prompts = {
        name: {"text": torch.full((1, 3), value)} for name, value in (("", -1.0), ("a", 1.0), ("b", 2.0))
    }
    pictures = Pictures(
        latents,
        ["a", "b", "a", "b", "a"],
        prompts,
        frozenset({"x", "t", "text"}),
        "x",
        "t",
        Noising("flow"),
        lambda x: x,
    )
    seen = set()
    for seed in range(30):
        batch = pictures.draw(torch.Generator().manual_seed(seed), 8)
        assert batch.inputs["x"].shape == batch.target.shape == (8, 2, 4, 4)
        sigma = (batch.inputs["t"] / 1000).reshape(-1, 1, 1, 1)
        clean = batch.inputs["x"] - sigma * batch.target
        number = clean.mean(dim=(1, 2, 3)).round()
        torch.testing.assert_close(clean, number.reshape(-1, 1, 1, 1).expand_as(clean), atol=1e-4, rtol=0)
        for row, text in zip(number, batch.inputs["text"][:, 0], strict=True):
            assert float(text) in (-1.0, 1.0 + float(row) % 2)
            seen.add(float(text))
    assert seen == {-1.0, 1.0, 2.0}  # some prompts are left out


@pytest.mark.parametrize(
    ("model", "prediction"), [("tiny-sd3", "flow"), ("tiny-flux", "flow"), ("tiny-sdxl", "epsilon")]
)
def test_batches_of_pictures_run_in_the_backbone(model: str, prediction: str, tmp_path: Path) -> None:
    """What the pipeline makes of prompts, and latents with noise, are inputs that the backbone takes."""
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"prompt {name}", encoding="utf-8")
    plan = check(TrainRequest(model, tmp_path / "out", "nvfp4", image_size=64, text_tokens=16))
    source, pixels = plan.source, plan.pixels
    pipe = open_pipeline(source, dtype=torch.float32, fix="")
    call = call_arguments(pipe, plan)
    pictures = read_pictures(str(tmp_path), pixels, 0)
    found = encode_pictures(pipe, source, pictures, call, lambda done, total: None)
    assert found.noising.kind == prediction
    assert set(found.prompts) == {"", "prompt a", "prompt b"}
    batch = found.draw(torch.Generator().manual_seed(3), 3)
    assert batch.inputs.keys() == {item.name for item in source.family.inputs(source.config)}
    kwargs = forward_kwargs(source.family, source.config, dict(batch.inputs))
    with torch.no_grad():
        output = getattr(pipe, source.family.component)(**kwargs, return_dict=False)[0]
    assert output.shape == batch.target.shape
    assert bool(torch.isfinite(output).all())
