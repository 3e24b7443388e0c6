"""What the trained embedded models learn from: scikit-learn's digits as ink on paper, and prompts that name them.

python -m tools.train.data tests/data/digits.npz    # writes 200 images that the reader of digits never saw
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from diffc.models.embedded.digits import WORDS
from diffc.train.digits import TEMPLATES, Digits, load, prompts

__all__ = ["Digits", "load", "prompts", "random_prompt", "write_unseen"]

_TEXT = (
    "a an the one's of on in by with and very big small old new nice red blue black white green paper ink pen hand"
    " handwritten written digit number figure picture photo scan drawing sketch image simple clean bold thin please"
    " draw write show me this is letter page sheet note number's cat fox house snow light morning portrait"
)
FILLERS = _TEXT.split()


def random_prompt(source: random.Random) -> tuple[str, int]:
    """Any text around one number word or numeral, with its digit; one in eleven names none and has 10."""
    digit = source.randrange(11)
    if digit < 10 and source.random() < 0.3:
        return source.choice(TEMPLATES).format(source.choice((WORDS[digit], str(digit)))), digit
    words = [_filler(source) for _ in range(source.randrange(0, 9))]
    if digit < 10:
        words.insert(source.randint(0, len(words)), source.choice((WORDS[digit], str(digit))))
    return " ".join(words), digit


def _filler(source: random.Random) -> str:
    """A word, or letters that may be one."""
    if source.random() < 0.6:
        return source.choice(FILLERS)
    word = "".join(source.choices("etaoinshrdlucmfwypvbgkxqjz", k=source.randint(2, 9)))
    return word if word not in WORDS else "x"


def write_unseen(path: Path) -> None:
    """200 images of half 1 for the tests: uint8 [200, 16, 16] of grey and the digits [200]."""
    images, labels = load(1, torch.device("cpu")).plain()
    grey = functional.adaptive_avg_pool2d(images[:200].mean(dim=1), 16)
    np.savez_compressed(path, images=(grey * 255).round().byte().numpy(), digits=labels[:200].byte().numpy())


if __name__ == "__main__":
    write_unseen(Path(sys.argv[1]))
