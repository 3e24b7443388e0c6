"""Pictures of noise, and small networks with random weights whose scores differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPTS = ("a handwritten seven", "a red fox in the snow", "9")
MODELS = ("torch", "fp8", "nvfp4")


def picture(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def data(folder: Path) -> Path:
    """pictures.json with three prompts and models, whose pictures are further and further from the first's."""
    entries = []
    for number, prompt in enumerate(PROMPTS):
        images = {}
        for index, model in enumerate(MODELS):
            base = np.asarray(picture(number), np.int16)
            noise = np.random.default_rng(9 * number + index).integers(-20, 21, base.shape) * index
            images[model] = f"{model}-{number}.png"
            Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(folder / images[model])
        entries.append({"prompt": prompt, "images": images})
    (folder / "pictures.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "pictures.json"


def small_clip(folder: Path) -> Path:
    """A folder with a random CLIP of 0.5 MB, its tokenizer and what it does to pixels."""
    from transformers import CLIPConfig, CLIPModel

    from diffc.models.embedded.tiny_text import clip_tokenizer

    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "image_processor_type": "CLIPImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def reward_weights(words: int) -> dict[str, torch.Tensor]:
    """The tensors of a small ImageReward by their own names: width 64, one head, two layers each."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, Any] = {}

    def put(name: str, *shape: int, near: float = 0.0) -> None:
        found[name] = torch.randn(shape, generator=generator) * 0.15 + near

    def linear(name: str, out: int, inner: int) -> None:
        put(f"{name}.weight", out, inner)
        put(f"{name}.bias", out)

    def norm(name: str) -> None:
        put(f"{name}.weight", 64, near=1.0)
        put(f"{name}.bias", 64)

    seen, read = "blip.visual_encoder.", "blip.text_encoder."
    put(f"{seen}cls_token", 1, 1, 64)
    put(f"{seen}pos_embed", 1, 17, 64)
    put(f"{seen}patch_embed.proj.weight", 64, 3, 8, 8)
    put(f"{seen}patch_embed.proj.bias", 64)
    norm(f"{seen}norm")
    for n in range(2):
        block = f"{seen}blocks.{n}."
        norm(f"{block}norm1")
        norm(f"{block}norm2")
        for part, out, inner in (
            ("attn.qkv", 192, 64),
            ("attn.proj", 64, 64),
            ("mlp.fc1", 96, 64),
            ("mlp.fc2", 64, 96),
        ):
            linear(f"{block}{part}", out, inner)
    put(f"{read}embeddings.word_embeddings.weight", words, 64)
    put(f"{read}embeddings.position_embeddings.weight", 40, 64)
    norm(f"{read}embeddings.LayerNorm")
    for n in range(2):
        layer = f"{read}encoder.layer.{n}."
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{layer}{attention}.self.{part}", 64, 64)
            linear(f"{layer}{attention}.output.dense", 64, 64)
            norm(f"{layer}{attention}.output.LayerNorm")
        linear(f"{layer}intermediate.dense", 96, 64)
        linear(f"{layer}output.dense", 64, 96)
        norm(f"{layer}output.LayerNorm")
    for number, (out, inner) in zip(
        (0, 2, 4, 6, 7), ((48, 64), (24, 48), (12, 24), (6, 12), (1, 6)), strict=True
    ):
        linear(f"mlp.layers.{number}", out, inner)
    return found


def vocabulary(folder: Path) -> tuple[Path, int]:
    """A folder with a BERT tokenizer of a few words, and how many there are."""
    from transformers import BertTokenizer

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "red",
        "fox",
        "in",
        "the",
        "snow",
        "seven",
        "9",
    ]
    words += ["hand", "##written"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder, len(words)
