"""The quality table: what is painted, how it is judged, what a layer's noise is, and what a page says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.quality.layers import measured, quantized_layers
from diffc.quality.painting import asked, judge, load_pipeline, paint
from diffc.quality.pictures import psnr, to_image
from diffc.quality.strips import decode, encode, sheet
from diffc.runtime.load import load
from tests import DATA
from tests.conftest import Cells
from tools.pages import matrix, quality, quality_table

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


def test_noise_of_a_layer_is_its_own() -> None:
    """The second layer is exact, though the first one's rounding would change its input."""
    torch.manual_seed(8)
    backbone = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    other = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    other.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        other[0].weight.mul_(1.01)
        other[0].bias.mul_(1.01)
    x = torch.randn(3, 5, 16)
    expected = backbone(x)
    with measured(backbone, other, ["0", "2"]) as sums:
        for part in x:
            assert torch.equal(backbone(part), expected[x.eq(part).all(-1).all(-1)][0])
    assert sums["0"].snr == pytest.approx(40, abs=1e-3)  # 20 log10(1 / 0.01)
    assert sums["2"].snr == math.inf
    seen = sums["0"].signal
    backbone(x)
    assert sums["0"].signal == seen  # nothing is watched after the block


def test_layers_are_those_that_a_format_quantizes() -> None:
    from diffc.quantize.convert import insert_quantizers
    from diffc.quantize.formats import FORMATS

    model = nn.ModuleDict({"a": nn.Linear(32, 32), "norm": nn.LayerNorm(32), "kept": nn.Linear(32, 32)})
    assert quantized_layers(model) == []
    insert_quantizers(model, FORMATS["fp8"], "kept")
    assert quantized_layers(model) == ["a"]


def test_strips_keep_the_pixels() -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    row = decode(encode(images))
    assert row.size == (192, 64)
    assert row.crop((64, 0, 128, 64)).tobytes() == to_image(images[1]).tobytes()
    ink = Image.new("RGB", (192, 64), (30, 40, 120))
    whole = sheet([("torch", ink), ("int8_smoothquant", ink)])
    assert whole.height == 2 * 64 + 4
    assert whole.convert("RGB").getpixel((whole.width - 1, 100)) == (30, 40, 120)


def row(cell: str, right: float, **more: Any) -> dict[str, Any]:
    strip = encode(digits_on_paper(10))
    base = {"model": "digits-sd3", "cell": cell, "error": "", "images": 100, "steps": 10, "keep": []}
    return base | {"right": right, "psnr": 30.0, "ssim": 0.9, "strip": strip} | more


def test_the_page_says_what_is_beyond_its_limit(tmp_path: Path) -> None:
    layers = [{"path": f"blocks.{i}.to_v", "snr": 5.0 + i} for i in range(20)]
    rows = [
        row("torch", 0.99, psnr=math.inf),
        row("int8", 0.97),
        row("fp8", 0.96, layers=layers),
        row("nvfp4+mha", 0.94),
        row("int4_awq", 0.0, error="no such thing\n  more"),
    ]
    page = quality_table.markdown(rows)
    result = {line.split(" | ")[1]: line for line in page.splitlines() if line.startswith("| digits-sd3")}
    assert "| 2 | 2 |" in result["int8"]
    assert result["int8"].endswith("within |")
    assert "| 3 | 2 |" in result["fp8"]
    assert result["fp8"].endswith("beyond |")
    assert result["nvfp4+mha"].endswith("within |")
    assert result["int4_awq"].endswith("failed: no such thing |")
    assert "`blocks.0.to_v` | 5.0" in page
    assert "`blocks.19.to_v`" not in page
    assert "--images 100 --steps 10" in page
    (name,) = quality_table.sheets(rows)
    assert f"({name})" in page
    quality_table.sheets(rows)[name].save(tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.height == 4 * 68 - 4


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    setup = quality.Setup(images=100, steps=10)
    file = tmp_path / "rows.json"
    assert quality.kept(file, setup) == []
    rows = [row("fp8", 1.0), row("int8", 1.0, steps=20), row("nvfp4", 1.0, keep=["*to_v"])]
    file.write_text(json.dumps(rows))
    assert [r["cell"] for r in quality.kept(file, setup)] == ["fp8"]
    assert [r["cell"] for r in quality.kept(file, quality.Setup(keep=("*to_v",)))] == ["nvfp4"]


def test_every_cell_is_a_compile_that_can_be_made(tmp_path: Path) -> None:
    from diffc.compile.spine import check

    cells = matrix.CELLS
    for model in quality.MODELS:
        for cell in cells:
            plan = check(quality.cell_request(model, cell, tmp_path / "x", quality.Setup()))
            assert plan.dtype == "float16"
            assert plan.request.options.mha == cell.endswith("+mha")
    failed = quality.run_cell("digits-sd3", "fp8", quality.Setup(images=0))
    assert "images is 0" in failed["error"]


def test_asked_is_every_digit_in_turn() -> None:
    assert asked(12) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
