"""diffc generate: pictures, their figures, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from diffc.cli.main import run
from diffc.commands.generate import asked_digit
from diffc.errors import DiffcError
from diffc.quality.pictures import Column, montage, psnr, save_png, ssim, to_image
from tests.cli_helpers import Capture, refusal
from tests.conftest import Cells

SMALL = {"targets": ("ort",), "sms": (), "dtype": "float32", "skip_validation": True}
SEVEN = ("--prompt", "a handwritten seven", "--steps", "6")


def test_it_paints_what_was_asked_beside_torch(compiled: Cells, tmp_path: Path, capsys: Capture) -> None:
    artifact = str(compiled("digits-sd3", "none", **SMALL).folder)
    out = tmp_path / "seven.png"
    assert run(["generate", artifact, *SEVEN, "--compare", "torch", "--batch", "2", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("2 of 2 right") == 2
    assert float(said.split("PSNR ")[1].split()[0]) > 40
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 2 * 192
        assert picture.height > 2 * 192
    assert [p.name for p in out.parent.iterdir()] == ["seven.png"]


def test_refusals(compiled: Cells, tmp_path: Path, capsys: Capture) -> None:
    artifact = str(compiled("digits-sd3", "none", **SMALL).folder)
    out = ["-o", str(tmp_path / "x.png")]
    cases = [
        (["generate", str(tmp_path), *SEVEN, *out], "not a diffc artifact"),
        (["generate", artifact, *SEVEN, "--size", "70", *out], "multiple of 16"),
        (["generate", artifact, *SEVEN, "--target", "ort-cuda", *out], "was compiled for ort"),
        (["generate", artifact, *SEVEN, "--pipeline", "no-such-folder", *out], "--pipeline"),
        (["generate", artifact, *SEVEN, "--pipeline", "digits-sdxl", *out], "family sdxl"),
    ]
    for arguments, message in cases:
        assert message in refusal(arguments, tmp_path, capsys, code=2 if "--size" in arguments else 1)


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [
        ("a handwritten seven", 7),
        ("the digit 0.", 0),
        ("one or two", None),
        ("a fox", None),
        ("17 foxes", None),
    ],
)
def test_the_digit_that_a_prompt_asks_for(prompt: str, digit: int | None) -> None:
    assert asked_digit(prompt) == digit


def test_figures_fall_with_the_noise() -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 0.5 + 0.25
    noise = torch.randn(images.shape, generator=generator)
    assert psnr(images, images) == float("inf")
    assert ssim(images, images) == pytest.approx(1)
    assert psnr(images + 0.1, images) == pytest.approx(20, abs=1e-3)
    assert ssim(images + 0.3 * noise, images) < ssim(images + 0.05 * noise, images) < 0.999


def test_pictures_hold_the_pixels(tmp_path: Path) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    sheet = montage([Column(pixels, ("torch",)), Column(pixels.flip(0), ("fp8", "PSNR"))])
    assert sheet.size == (2 * 192 + 3 * 12, 12 + 2 * 18 + 2 * 204 + 12)
    left = sheet.crop((12, 60, 12 + 192, 60 + 192)).resize((64, 64), Image.Resampling.NEAREST)
    assert left.tobytes() == to_image(pixels[0]).tobytes()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiffcError, match="cannot write"):
        save_png(sheet, tmp_path / "file" / "x.png")
