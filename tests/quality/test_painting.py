"""Figures of painted pictures, of torch and of compiled backbones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.quality.painting import asked, judge, load_pipeline, paint
from diffc.quality.pictures import psnr
from diffc.runtime.load import load
from tests import DATA
from tests.conftest import Cells

SMALL = {"targets": ("ort",), "sms": (), "dtype": "float32", "skip_validation": True}


def digits_on_paper(count: int) -> Tensor:
    """Real handwriting, image i a digit i % 10, [count, 3, 64, 64]."""
    stored = np.load(DATA / "digits.npz")
    order = [np.flatnonzero(stored["digits"] == i % 10)[i // 10] for i in range(count)]
    grey = torch.from_numpy(stored["images"][order] / 255.0).float()
    return nn.functional.interpolate(grey[:, None], size=(64, 64)).expand(-1, 3, -1, -1).contiguous()


def test_a_compiled_backbone_paints_what_torch_does(compiled: Cells) -> None:
    pipe = load_pipeline("digits-sd3")
    reference = paint(pipe, 4, steps=4, batch=4)
    assert reference.shape == (4, 3, 64, 64)
    torch.testing.assert_close(paint(pipe, 4, steps=4, batch=3), reference, rtol=0, atol=1e-4)
    with load(compiled("digits-sd3", "none", **SMALL).folder, target="ort", dtype=torch.float32) as backbone:
        pipe.transformer = backbone
        figures = judge(paint(pipe, 4, steps=4, batch=4), reference)
    assert (figures.read, figures.right) == ((0, 1, 2, 3), 1.0)
    assert figures.psnr > 40
    assert figures.ssim > 0.99
    with pytest.raises(DiffcError, match="steps is 0"):
        paint(pipe, 4, steps=0, batch=4)


def test_figures_fall_with_what_is_wrong() -> None:
    images = digits_on_paper(20)
    whole = judge(images, images)
    assert whole.right >= 0.9
    assert (whole.psnr, whole.ssim) == (math.inf, pytest.approx(1, abs=1e-3))
    shifted = judge(images.roll(1, dims=0), images)
    assert shifted.right < 0.2
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    noisy = judge(images + noise, images)
    assert noisy.psnr == pytest.approx(20, abs=0.3)
    assert noisy.psnr == pytest.approx(np.mean([psnr(i + n, i) for i, n in zip(images, noise, strict=True)]))
    broken = images.clone()
    broken[:5, 0, 3, 3] = math.nan
    assert judge(broken, images + noise).read[:6].count(-1) == 5
    assert judge(broken, images).right <= whole.right - 4 / 20
    with pytest.raises(DiffcError, match="paint both alike"):
        judge(images, images[:3])


def test_asked_is_every_digit_in_turn() -> None:
    assert asked(12) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
