"""ImageReward (Xu et al. 2023): how much people would like a picture for a prompt, by a BLIP and a small network on it.

The package image-reward does not install beside transformers 5. Its weights are those of two networks that transformers
has, under other names; only the five linear layers on top are written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.quality.metrics.clip import MEAN, STD, Preparation
from diffc.quality.metrics.files import file_of, folder_of

WEIGHTS, VOCABULARY = "zai-org/ImageReward/ImageReward.pt", "google-bert/bert-base-uncased"
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
"""Of the network's output over the authors' data: scores have mean 0 and deviation 1 there."""
TOKENS = 35
_HEAD = 64
"""Width of a head of attention, in both networks."""
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
)


class ImageReward:
    """The two networks and the layers on them, on the CPU or a GPU."""

    def __init__(self, weights: str = WEIGHTS, vocabulary: str = VOCABULARY, device: str = "cpu") -> None:
        from transformers import AutoTokenizer

        file = file_of(weights, "--imagereward")
        texts = folder_of(vocabulary, "--bert", ("*.json", "vocab.txt"))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(texts, local_files_only=True)
        vision, text, head = networks(read_weights(file))
        self._vision, self._text, self._head = (part.eval().to(device) for part in (vision, text, head))
        side = int(vision.config.image_size)
        self._pixels, self._device = Preparation(side, side, MEAN, STD), device

    def tokens(self, text: str) -> int:
        """How many tokens a text has; those beyond TOKENS are cut."""
        return len(self._tokenizer(text)["input_ids"])

    @torch.no_grad()
    def score(self, image: Image.Image, prompt: str) -> float:
        """The reward of a picture for a prompt."""
        seen = self._vision(self._pixels(image).to(self._device)).last_hidden_state
        given = self._tokenizer(
            prompt, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self._device)
        read = self._text(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return (float(self._head(read[:, 0]).item()) - SCORE_MEAN) / SCORE_STD


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of ImageReward.pt, without running what a pickle could hold. Raises DiffcError for another file."""
    import pickle

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise DiffcError(f"cannot read {file}: {error}", fix="download ImageReward.pt again") from error
    if (
        not isinstance(content, dict)
        or not {"mlp.layers.0.weight", "blip.visual_encoder.cls_token"} <= content.keys()
    ):
        raise DiffcError(f"{file} does not hold the weights of ImageReward", fix="give ImageReward.pt")
    return content


def networks(weights: Mapping[str, Tensor]) -> tuple[Any, Any, nn.Module]:
    """Vision network, text network and the layers on top, filled; all sizes are read off the weights.

    Raises DiffcError when a tensor is missing.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    seen = _renamed(_part(weights, "blip.visual_encoder."), _VISION)
    read = _part(weights, "blip.text_encoder.")
    patch = seen["embeddings.patch_embedding.weight"]
    side = int((seen["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch.shape[-1]
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=patch.shape[0],
            intermediate_size=seen["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count(seen, "encoder.layers."),
            num_attention_heads=patch.shape[0] // _HEAD,
            image_size=side,
            patch_size=patch.shape[-1],
            layer_norm_eps=1e-6,
        )
    )
    words = read["embeddings.word_embeddings.weight"]
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=words.shape[0],
            hidden_size=words.shape[1],
            encoder_hidden_size=patch.shape[0],
            intermediate_size=read["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_count(read, "encoder.layer."),
            num_attention_heads=words.shape[1] // _HEAD,
            max_position_embeddings=read["embeddings.position_embeddings.weight"].shape[0],
            layer_norm_eps=1e-12,
            hidden_act="gelu",
            is_decoder=True,  # it has cross attention; the call says that it looks both ways
        ),
        add_pooling_layer=False,
    )
    head = _head_of(_part(weights, "mlp."))
    _fill(vision, seen)
    _fill(text, read)
    return vision, text, head


def _head_of(weights: Mapping[str, Tensor]) -> nn.Module:
    """The linear layers in their order; between them there was dropout alone."""
    numbers = sorted({int(name.split(".")[1]) for name in weights})
    layers = []
    for number in numbers:
        weight, bias = weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _renamed(weights: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        for pattern, other in rules:
            name = re.sub(pattern, other, name)
        found[name] = value
    return found


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(
        int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix)
    )


def _fill(network: Any, weights: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    if lacking := sorted(own.keys() - weights.keys()):
        raise DiffcError(f"the weights of ImageReward lack {lacking[0]}", fix="download ImageReward.pt again")
    network.load_state_dict({name: weights[name] for name in own})
