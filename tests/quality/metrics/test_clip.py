"""CLIP score and CLIP-IQA against torchmetrics on the same pictures, and pixels against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.multimodal import CLIPImageQualityAssessment, CLIPScore

from diffc.errors import DiffcError
from diffc.quality.metrics.clip import ANCHORS, Clip, Preparation
from tests.quality.metrics.pictures import PROMPTS, picture, small_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """The model and processor for torchmetrics, which wants features and not the object that transformers 5 gives."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    class Features(CLIPModel):
        def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
            return super().get_text_features(*args, **kwargs).pooler_output

        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            return super().get_image_features(*args, **kwargs).pooler_output

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)

    class Processor:
        def __init__(self) -> None:
            self.tokenizer, self.image_processor = tokenizer, pixels

        def __call__(self, text: Any = None, images: Any = None, **_: Any) -> Any:
            given: dict[str, Any] = {}
            if text is not None:
                given |= tokenizer(text, return_tensors="pt", padding=True)
            if images is not None:
                given |= pixels(images, return_tensors="pt")
            return given

    return Features.from_pretrained(folder).eval(), Processor()


def as_uint8(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(40, 56), (57, 41), (32, 32), (20, 20)])
def test_pixels_are_those_of_transformers(folder: Path, size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(1, size)
    expected = CLIPImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(Preparation.of_folder(folder)(image), expected, rtol=1e-5, atol=1e-5)


def test_the_clip_score_is_that_of_torchmetrics(folder: Path, theirs: Any) -> None:
    ours, scores = Clip(str(folder)), []
    for number, prompt in enumerate(PROMPTS):
        metric = CLIPScore(model_name_or_path=lambda: theirs)
        metric.score, metric.n_samples = metric.score * 0, metric.n_samples * 0
        image = picture(number)
        metric.update(as_uint8(image), prompt)
        scores.append(ours.score(image, prompt))
        mean = float(metric.score / metric.n_samples)  # compute() cuts it at 0
        assert scores[-1] == pytest.approx(mean, abs=1e-3)
    assert max(scores) - min(scores) > 1


def test_clip_iqa_is_that_of_torchmetrics(folder: Path, theirs: Any) -> None:
    ours, scores = Clip(str(folder)), []
    metric = CLIPImageQualityAssessment(model_name_or_path=lambda: theirs, prompts=(ANCHORS,))
    for number in range(4):
        image = picture(number)
        scores.append(ours.quality(image))
        expected = float(metric(as_uint8(image)[None].float()))
        assert scores[-1] == pytest.approx(expected, abs=1e-4)
    assert max(scores) - min(scores) > 1e-3


def test_long_prompts_are_counted(folder: Path) -> None:
    clip = Clip(str(folder))
    assert clip.limit == 77
    assert clip.tokens("a fox " * 90) > 77
    assert np.isfinite(clip.score(picture(0), "a fox " * 90))


def test_what_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DiffcError, match=r"is not here and cannot be fetched[\s\S]*--clip-model"):
        Clip("nobody/no-such-clip")
