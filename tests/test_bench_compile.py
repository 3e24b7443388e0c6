"""tools/bench_compile.py on one block of FLUX.1-dev of each kind: 0.7 billion weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "bench_compile.py"


@pytest.mark.slow  # minutes, and 7 GB of memory for ModelOpt's route
def test_both_routes(tmp_path: Path) -> None:
    table = tmp_path / "rows.json"
    options = ["--depths", "1", "--pixels", "64", "--folder", str(tmp_path), "--json", str(table)]
    subprocess.run([sys.executable, str(TOOL), *options], check=True, timeout=900)
    ours, legacy = json.loads(table.read_text(encoding="utf-8"))
    assert (ours["route"], legacy["route"]) == ("diffc", "modelopt")
    assert ours["error"] == legacy["error"] == ""
    assert ours["parameters"] == legacy["parameters"] > 5e8
    # 8-bit weights beside 16-bit ones, written once beside twice.
    assert ours["on_disk"] < 1.2 * ours["parameters"]
    assert 3.9 * ours["parameters"] < legacy["on_disk"] < 4.2 * ours["parameters"]
    assert ours["peak_rss"] < legacy["peak_rss"]
    for row in (ours, legacy):
        assert row["nodes"] > 100
        assert sum(stage["wall"] for stage in row["stages"]) < row["wall"]
