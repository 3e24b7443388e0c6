"""ImageReward on small random weights by its own names, against its arithmetic written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffc.errors import DiffcError
from diffc.quality.metrics.clip import MEAN, STD, Preparation
from diffc.quality.metrics.image_reward import SCORE_MEAN, SCORE_STD, TOKENS, ImageReward, read_weights
from tests.quality.metrics.pictures import PROMPTS, picture, reward_weights, vocabulary


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageReward, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("reward")
    words, count = vocabulary(folder / "bert")
    weights = reward_weights(count)
    torch.save(weights, folder / "ImageReward.pt")
    return ImageReward(str(folder / "ImageReward.pt"), str(words)), weights


def written_out(weights: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> float:
    """BLIP's vision transformer and BERT with cross attention, one head of width 64."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, (64,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 64**0.5
        return (scores if hidden is None else scores.masked_fill(hidden, -1e30)).softmax(-1) @ v

    seen, read = "blip.visual_encoder.", "blip.text_encoder."
    patch = weights[f"{seen}patch_embed.proj.weight"]
    x = F.conv2d(pixels, patch, weights[f"{seen}patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([weights[f"{seen}cls_token"], x], dim=1) + weights[f"{seen}pos_embed"]
    for n in range(2):
        block = f"{seen}blocks.{n}."
        q, k, v = linear(norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v), f"{block}attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")), f"{block}mlp.fc2")
    image = norm(x, f"{seen}norm", 1e-6)
    places = weights[f"{read}embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(
        weights[f"{read}embeddings.word_embeddings.weight"][ids] + places,
        f"{read}embeddings.LayerNorm",
        1e-12,
    )
    for n in range(2):
        layer = f"{read}encoder.layer.{n}."
        for name, other, hidden in (("attention", None, mask[:, None] == 0), ("crossattention", image, None)):
            source = y if other is None else other
            q, k, v = (
                linear(t, f"{layer}{name}.self.{part}")
                for t, part in ((y, "query"), (source, "key"), (source, "value"))
            )
            y = norm(
                y + linear(attend(q, k, v, hidden), f"{layer}{name}.output.dense"),
                f"{layer}{name}.output.LayerNorm",
                1e-12,
            )
        inner = linear(F.gelu(linear(y, f"{layer}intermediate.dense")), f"{layer}output.dense")
        y = norm(y + inner, f"{layer}output.LayerNorm", 1e-12)
    out = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        out = linear(out, f"mlp.layers.{number}")
    return (float(out.item()) - SCORE_MEAN) / SCORE_STD


def test_scores_are_those_of_its_arithmetic(reward: tuple[ImageReward, dict[str, Tensor]]) -> None:
    ours, weights = reward
    scores = []
    for number, prompt in enumerate(PROMPTS):
        image = picture(number)
        given = ours._tokenizer(prompt, padding="max_length", max_length=TOKENS, return_tensors="pt")
        pixels = Preparation(32, 32, MEAN, STD)(image)
        scores.append(ours.score(image, prompt))
        expected = written_out(weights, pixels, given["input_ids"], given["attention_mask"])
        assert scores[-1] == pytest.approx(expected, abs=1e-4)
    assert max(scores) - min(scores) > 1e-3
    assert ours.score(picture(0), PROMPTS[1]) != pytest.approx(scores[0], abs=1e-5)  # the prompt counts


def test_other_files_are_refused(reward: tuple[ImageReward, dict[str, Tensor]], tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(DiffcError, match="does not hold the weights of ImageReward"):
        read_weights(tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(b"no")
    with pytest.raises(DiffcError, match="cannot read"):
        read_weights(tmp_path / "cut.pt")
    weights = dict(reward[1])
    del weights["blip.visual_encoder.norm.bias"]
    torch.save(weights, tmp_path / "part.pt")
    words, _ = vocabulary(tmp_path / "bert")
    with pytest.raises(DiffcError, match=r"lack post_layernorm\.bias"):
        ImageReward(str(tmp_path / "part.pt"), str(words))
