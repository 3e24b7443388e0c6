"""The quality table: what is painted, how it is judged, what a layer's noise is, and what a page says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffc.quality.strips import encode
from tests import DATA
from tools.pages import matrix, quality, quality_table, video_table


def digits_on_paper(count: int) -> Tensor:
    """Real handwriting, image i a digit i % 10, [count, 3, 64, 64]."""
    stored = np.load(DATA / "digits.npz")
    order = [np.flatnonzero(stored["digits"] == i % 10)[i // 10] for i in range(count)]
    grey = torch.from_numpy(stored["images"][order] / 255.0).float()
    return nn.functional.interpolate(grey[:, None], size=(64, 64)).expand(-1, 3, -1, -1).contiguous()


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


def test_the_section_on_videos_stays_when_the_page_is_written_anew() -> None:
    video = {
        "error": "",
        "right": 1.0,
        "moved": 1.0,
        "psnr": math.inf,
        "ssim": 1.0,
        "strip": encode(torch.ones(9, 3, 8, 8)),
    }
    rows = [
        video | {"cell": "torch"},
        video | {"cell": "fp8", "right": 0.975, "psnr": 31.04, "reused": 0.0},
        video | {"cell": "none, blocks:every=2", "moved": 0.98, "psnr": 28.0, "reused": 0.5},
        video | {"cell": "int8", "error": "no such thing\n  more"},
    ]
    text = video_table.section(rows, 50, 10)
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert lines["| fp8"] == "| fp8 | 97.5% | 2.5 | 2 | 100% | 31.0 | 1.000 |  |"
    assert (
        lines["| none, blocks:every=2"]
        == "| none, blocks:every=2 | 100.0% | 0.0 | 2 | 98% | 28.0 | 1.000 | 50% |"
    )
    assert lines["| int8"].endswith("failed: no such thing |")
    assert video_table.picture(rows).height == 3 * (16 + 4) - 4

    page = video_table.with_section("# Quality\n\ntext\n", text)
    assert video_table.section_of(page) == text.strip("\n")
    assert video_table.with_section(page, text) == page
    again = video_table.with_section("# Quality\n\nother\n", video_table.section_of(page))
    assert again == page.replace("text\n", "other\n", 1)
    assert video_table.with_section("# Quality\n", video_table.section_of("# Quality\n")) == "# Quality\n"
