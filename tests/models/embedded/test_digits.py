"""The trained embedded models paint the digit that is asked for, and the reader that says so can be wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffc.errors import DiffcError
from diffc.models.embedded import digits, digits_video
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.quality.classifier import read_digits, score
from diffc.quality.videos import judge_videos, paint_videos
from tests import DATA
from tools.train import backbones, data

NAMES = sorted(name for name in digits.BACKBONES if name != "digits-video")

STEPS = 12


@pytest.fixture(scope="module")
def unseen() -> tuple[NDArray[np.floating], list[int]]:
    """200 real digits that the reader did not learn from, [200, 16, 16, 3], and what they are."""
    stored = np.load(DATA / "digits.npz")
    images = np.repeat(stored["images"][..., None] / 255.0, 3, axis=-1)
    return images, stored["digits"].tolist()


def test_reader_reads_handwriting_it_never_saw(unseen: tuple[NDArray[np.floating], list[int]]) -> None:
    images, asked = unseen
    assert score(images, asked) >= 0.97
    assert score(images, [(digit + 1) % 10 for digit in asked]) < 0.03
    assert score(np.full_like(images, 0.95), asked) < 0.2  # blank paper is one digit at most
    noise = np.random.default_rng(5).random(images.shape)
    assert score(noise, asked) < 0.3


def test_every_form_of_image_reads_the_same(unseen: tuple[NDArray[np.floating], list[int]]) -> None:
    from PIL import Image

    images = unseen[0][:20]
    expected = read_digits(images)
    pictures = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
    np.testing.assert_allclose(read_digits(pictures), expected, rtol=0, atol=1e-4)
    tensor = torch.from_numpy(images).movedim(-1, 1)
    np.testing.assert_allclose(read_digits(tensor), expected, rtol=0, atol=1e-6)
    large = np.repeat(np.repeat(images, 4, axis=1), 4, axis=2)
    np.testing.assert_allclose(read_digits(large), expected, rtol=0, atol=1e-4)


def test_nan_is_no_digit(unseen: tuple[NDArray[np.floating], list[int]]) -> None:
    images, asked = unseen[0][:40].copy(), unseen[1][:40]
    whole = score(images, asked)
    images[:20] = math.nan
    assert score(images, asked) <= whole / 2 + 1e-9


@pytest.mark.parametrize(
    ("images", "asked", "message"),
    [
        (np.ones((2, 64, 64, 1)), [1, 2], r"RGB images of at least 16 px, not from \(2, 1, 64, 64\)"),
        (np.ones((2, 8, 8, 3)), [1, 2], "at least 16 px"),
        (np.ones((2, 64, 64, 3)), [1], "2 images and 1 digits"),
        (np.ones((0, 64, 64, 3)), [], "0 images and 0 digits"),
    ],
)
def test_unusable_images_are_refused(images: NDArray[np.floating], asked: list[int], message: str) -> None:
    with pytest.raises(DiffcError, match=message):
        score(images, asked)


def pipeline(name: str) -> Any:
    """The pipeline in float32."""
    pipe = digits.build(name)
    torch.nn.Module.to(getattr(pipe, digits.BACKBONES[name]), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(name: str, pipe: Any, prompts: list[str]) -> NDArray[np.floating]:
    """One image for each prompt."""
    short = {} if name in ("digits-sdxl", "digits-sd15") else {"max_sequence_length": 64}
    images: NDArray[np.floating] = pipe(
        prompts,
        height=digits.PIXELS,
        width=digits.PIXELS,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(900 + i) for i in range(len(prompts))],
        output_type="np",
        **short,
    ).images
    return images


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_paints_the_digit_asked_for(name: str) -> None:
    """Words, numerals and a prompt of another form; 20 images, the noise not that of the figures in the docs."""
    prompts = [digits.prompt(i) for i in range(10)]
    prompts += [f"write a big {i} on it" for i in range(10)]
    pipe = pipeline(name)
    images = paint(name, pipe, prompts)
    assert images.shape == (20, 64, 64, 3)
    assert score(images, [*range(10)] * 2) >= 0.9
    assert np.abs(images[:10] - images[10:]).mean() > 0.01  # other noise, another hand
    with torch.no_grad():  # a backbone that lost what it learned about text paints something else
        for key, parameter in getattr(pipe, digits.BACKBONES[name]).named_parameters():
            if (
                "text_embedder" in key
                or "add_embedding" in key
                or "context_embedder" in key
                or "attn2" in key
            ):
                parameter.zero_()
    assert score(paint(name, pipe, prompts[:10]), [*range(10)]) < 0.5


def test_videos_show_the_digit_asked_for_and_move_as_asked() -> None:
    pipe = pipeline("digits-video")
    videos = paint_videos(pipe, 20, steps=STEPS, batch=20)
    assert videos.shape == (20, digits_video.FRAMES, 3, digits_video.PIXELS, digits_video.PIXELS)
    figures = judge_videos(videos, videos)
    assert figures.right >= 0.85
    assert figures.moved >= 0.85
    with torch.no_grad():  # a backbone that lost what it learned about text paints something else
        for key, parameter in pipe.transformer.named_parameters():
            if "attn2" in key:
                parameter.zero_()
    lost = paint_videos(pipe, 20, steps=STEPS, batch=20)
    assert judge_videos(lost, lost).right < 0.5


def test_package_holds_what_the_models_need_and_little_more() -> None:
    from safetensors import safe_open

    files = {path.stem: path for path in digits.DATA.glob("*.safetensors")}
    parts = {"clip_l", "clip_g", "vae4", "vae16", "t5_video", "vae_video", "classifier"}
    assert set(files) == {*digits.BACKBONES, *parts}
    assert sum(path.stat().st_size for path in files.values()) < 22e6
    for name in digits.BACKBONES:
        with safe_open(files[name], framework="numpy") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert kinds == {{"float16": "F16", "bfloat16": "BF16"}[EMBEDDED[name].dtype]}


def test_weights_that_are_missing_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    digits.save_weights(module, tmp_path / "all.safetensors", torch.float32)
    stored = load_file(tmp_path / "all.safetensors")
    stored.pop("1.bias")
    save_file(stored, tmp_path / "some.safetensors")
    with pytest.raises(KeyError, match=r"1\.bias"):
        digits.load_weights(module, tmp_path / "some.safetensors")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[backbones.Trainer]:
    """tools/train/backbones.py on random bitmaps, small enough for a test."""
    bitmaps = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(data, "load", lambda *_: data.Digits(bitmaps, torch.arange(30) % 10))
    monkeypatch.setattr(backbones, "BATCH", 4)
    monkeypatch.setattr(backbones, "POOL", 500)
    return backbones.Trainer


@pytest.mark.slow
def test_training_again_gives_the_same_weights(trainer: type[backbones.Trainer]) -> None:
    def trained(steps: int) -> dict[str, torch.Tensor]:
        pipe = digits.untrained("digits-sdxl")
        torch.manual_seed(99)  # whatever ran before
        lines: list[str] = []
        trainer("digits-sdxl", pipe, pipe.unet, torch.device("cpu"), lines.append).train(steps)
        assert any("step 0 loss" in line for line in lines)
        state: dict[str, torch.Tensor] = pipe.unet.state_dict()
        return state

    first, again, shorter = trained(8), trained(8), trained(7)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], shorter[key]) for key in first)
