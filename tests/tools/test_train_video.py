"""What digits-video is trained on and with, without training it."""

from __future__ import annotations

import random

import torch

from diffc.models.embedded.digits import untrained
from diffc.models.embedded.digits_video import DIRECTIONS, FRAMES
from diffc.quality.motion import read_videos
from diffc.train.digits import Digits
from tools.train.moving import MovingDigits, random_moving_prompt
from tools.train.video_parts import _scale_latents


def test_videos_move_as_their_kind_says() -> None:
    bitmaps = torch.zeros(2, 1, 8, 8)
    bitmaps[:, :, 2:6, 2:6] = 1
    videos, kinds = MovingDigits(Digits(bitmaps, torch.tensor([3, 8]))).draw(
        40, torch.Generator().manual_seed(7)
    )
    assert videos.shape == (40, 3, FRAMES, 32, 32)
    assert set((kinds % 10).tolist()) == {3, 8}
    assert set((kinds // 10).tolist()) == set(range(len(DIRECTIONS)))
    assert torch.equal(read_videos(videos.movedim(1, 2))[1], kinds // 10)


def test_random_prompts_name_one_direction_or_none() -> None:
    source = random.Random(8)
    for _ in range(300):
        text, _, number = random_moving_prompt(source)
        named = [word for word in text.split() if word in DIRECTIONS[1:]]
        assert named == ([DIRECTIONS[number]] if number else [])


def test_scaled_latents_decode_to_the_same_video() -> None:
    vae = untrained("digits-video").vae
    video = torch.rand(1, 3, FRAMES, 32, 32, generator=torch.Generator().manual_seed(9)) * 2 - 1
    with torch.no_grad():
        before = vae.encode(video).latent_dist
        decoded = vae.decode(before.mean).sample
        _scale_latents(vae, 0.25)
        after = vae.encode(video).latent_dist
        torch.testing.assert_close(after.mean, before.mean * 4)
        torch.testing.assert_close(after.std, before.std * 4)
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, rtol=1e-4, atol=1e-4)
