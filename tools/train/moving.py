"""Videos of digits that move in a straight line, and prompts that name digit and direction."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffc.models.embedded.digits import WORDS
from diffc.models.embedded.digits_video import DIRECTIONS, FRAMES, PIXELS
from diffc.train.digits import ROOM, TEMPLATES, Digits, random_affine, render
from tools.train.data import random_prompt

REACH = 0.36  # of half the page: how far from its middle a digit starts, and ends
SMALLER = 2.0 / ROOM  # a bitmap takes half of the page's width
STEPS = ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0))
"""Of each of DIRECTIONS, to the right and down."""
PHRASES = {
    "still": ("{}", "{} standing still"),
    **{name: (f"{{}} moving {name}", f"{{}} going {name}") for name in DIRECTIONS[1:]},
}


@dataclass(frozen=True)
class MovingDigits:
    """Videos of the bitmaps of `digits`. Their kind is ten times the number of the direction, plus the digit."""

    digits: Digits

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` videos [count, 3, FRAMES, 32, 32] in 0..1, each digit turned and moved a little, and their kinds."""
        device = self.digits.bitmaps.device
        chosen = torch.randint(len(self.digits.labels), (count,), generator=generator, device=device)
        directions = torch.randint(len(DIRECTIONS), (count,), generator=generator, device=device)
        paths = _paths(random_affine(count, generator, device) * SMALLER, directions)
        frames = render(self.digits.bitmaps[chosen].repeat_interleave(FRAMES, dim=0), paths.flatten(0, 1))
        frames = functional.interpolate(frames, (PIXELS, PIXELS), mode="area")
        videos = frames.unflatten(0, (count, FRAMES)).movedim(1, 2)
        return videos, directions * 10 + self.digits.labels[chosen]


def _paths(affine: Tensor, directions: Tensor) -> Tensor:
    """The affine map of every frame, [count, FRAMES, 2, 3]: they say where a pixel of the frame is on the bitmap."""
    moves = torch.tensor(STEPS, device=affine.device)[directions] * REACH
    times = torch.linspace(-1, 1, FRAMES, device=affine.device)
    offsets = times[None, :, None] * moves[:, None]
    paths = affine[:, None].repeat(1, FRAMES, 1, 1)
    paths[..., 2] -= torch.einsum("nij,nfj->nfi", affine[..., :2], offsets)
    return paths


def moving_prompts() -> tuple[list[str], Tensor]:
    """The prompts that the backbone learns, with the kind of each."""
    pairs = [
        (phrase.format(template.format(name)), 10 * number + digit)
        for number, direction in enumerate(DIRECTIONS)
        for phrase in PHRASES[direction]
        for template in TEMPLATES
        for digit in range(10)
        for name in (WORDS[digit], str(digit))
    ]
    return [text for text, _ in pairs], torch.tensor([kind for _, kind in pairs])


def random_moving_prompt(source: random.Random) -> tuple[str, int, int]:
    """Any text, with its digit (10 where it names none) and the number of its direction."""
    text, digit = random_prompt(source)
    text = " ".join(word for word in text.split() if word not in DIRECTIONS)
    number = source.randrange(len(DIRECTIONS))
    phrase = PHRASES[DIRECTIONS[number]][source.randrange(2)]
    if number and source.random() < 0.3:
        phrase = source.choice((f"{{}} to the {DIRECTIONS[number]}", f"{DIRECTIONS[number]} {{}}"))
    return phrase.format(text).strip(), digit, number
