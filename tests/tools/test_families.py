"""The table of backbones: rows of several runs add up, and what no run has reached says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tools.prove.families import BEGIN, END, table, write
from tools.prove.family_rows import Row, load_rows, merged, save_rows

ROW = Row(
    "sd15",
    "UNet2DConditionModel",
    "fp8",
    {"smooth": 1.2e-6, "float16": 0.01},
    ("SM89 7.0 MB",),
    None,
    9.0,
    "ok",
)


def test_rows_are_kept_and_add_up(tmp_path: Path) -> None:
    save_rows(tmp_path / "rows.json", [ROW])
    assert load_rows(tmp_path / "rows.json") == {("sd15", "fp8"): ROW}
    assert load_rows(tmp_path / "none.json") == {}
    painted = replace(ROW, engines=(), psnr=31.0)
    assert merged(ROW, painted) == replace(painted, engines=ROW.engines)
    failed = replace(painted, result="MismatchError: x")
    assert merged(ROW, failed) == failed
    assert merged(failed, painted) == painted


def test_the_page_says_what_was_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write(page, table({ROW.key: ROW}, ["sd15", "ltx"], ["none", "fp8", "nvfp4"]))
    lines = page.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    kept = [line for line in lines if line.startswith("| sd15")]
    assert kept == [
        "| sd15 | UNet2DConditionModel | fp8 | smooth 1.2e-06, float16 1.0e-02 | SM89 7.0 MB | - | ok |",
        "| sd15 | UNet2DConditionModel | none, nvfp4 | - | - | - | not run |",
    ]
    assert "| ltx | LTXVideoTransformer3DModel | none, fp8, nvfp4 | - | - | - | not run |" in lines
