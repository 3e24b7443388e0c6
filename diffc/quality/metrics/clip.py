"""CLIP score and CLIP-IQA with the figures of torchmetrics: own code, since torchmetrics 1.9 fails with transformers 5.

CLIP score (Hessel et al. 2021): 100 cos(picture, prompt). CLIP-IQA (Wang et al. 2022): how much nearer a picture is to
"Good photo." than to "Bad photo.", as torchmetrics has it and ModelOpt's evaluation used it: with the CLIP that is
given, and not with the authors' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffc.quality.metrics.files import folder_of
from diffc.records import read_record

CLIP = "openai/clip-vit-large-patch14"
ANCHORS = ("Good photo.", "Bad photo.")
_FILES = ("*.json", "merges.txt", "vocab.*", "*.safetensors", "pytorch_model.bin")


class Clip:
    """A CLIP on the CPU or a GPU, its tokenizer, and how it wants pictures."""

    def __init__(self, name: str = CLIP, device: str = "cpu", option: str = "--clip-model") -> None:
        from transformers import AutoTokenizer, CLIPModel

        folder = folder_of(name, option, _FILES)
        self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._pixels = Preparation.of_folder(folder)
        self._device = device
        self.limit = int(self._model.config.text_config.max_position_embeddings)
        self._anchors: Tensor | None = None

    def tokens(self, text: str) -> int:
        """How many tokens a text has; those beyond `limit` are cut."""
        return len(self._tokenizer(text)["input_ids"])

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, [N, D]."""
        given = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        )
        return _unit(self._model.get_text_features(**{k: v.to(self._device) for k, v in given.items()}))

    @torch.no_grad()
    def of_image(self, image: Image.Image) -> Tensor:
        """The unit vector of a picture, [1, D]."""
        return _unit(self._model.get_image_features(self._pixels(image).to(self._device)))

    def score(self, image: Image.Image, prompt: str) -> float:
        """100 cos(picture, prompt); torchmetrics cuts the mean over pictures at 0, which this does not."""
        return float(100 * (self.of_image(image) @ self.of_texts([prompt]).T))

    def quality(self, image: Image.Image) -> float:
        """CLIP-IQA, 0..1."""
        if self._anchors is None:
            self._anchors = self.of_texts(ANCHORS)
        logits = 100 * self.of_image(image) @ self._anchors.T
        return float(logits.softmax(-1)[0, 0])


def _unit(features: Any) -> Tensor:
    """Features as unit vectors. transformers 5 gives an object, whose pooled output they are."""
    vectors: Tensor = getattr(features, "pooler_output", features).float().cpu()
    unit: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return unit


class Preparation:
    """Pixels as a network wants them: shorter side scaled (bicubic), middle cut out, normalized."""

    def __init__(self, side: int, cut: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self._side, self._cut = side, cut
        self._mean, self._std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (mean, std))

    @classmethod
    def of_folder(cls, folder: Path) -> Preparation:
        """As preprocessor_config.json says; CLIP's own where it says nothing."""
        file = folder / "preprocessor_config.json"
        config = read_record(file, fix="download the folder again") if file.is_file() else {}
        config = config.get("image_processor", config)
        return cls(
            _side(config.get("size", 224), "shortest_edge"),
            _side(config.get("crop_size", 224), "height"),
            config.get("image_mean", MEAN),
            config.get("image_std", STD),
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """[1, 3, cut, cut], float32."""
        width, height = image.size
        if width <= height:
            size = self._side, int(self._side * height / width)
        else:
            size = int(self._side * width / height), self._side
        image = image.resize(size, Image.Resampling.BICUBIC)
        top, left = (size[1] - self._cut) // 2, (size[0] - self._cut) // 2
        image = image.crop((left, top, left + self._cut, top + self._cut))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
        return (pixels - self._mean) / self._std


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalization."""


def _side(value: Any, key: str) -> int:
    return int(value[key] if isinstance(value, dict) else value)
