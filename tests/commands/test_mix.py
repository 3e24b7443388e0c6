"""`diffc mix` from calibration to a checkpoint, its plan and its picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffc.commands.mix.request import MixRequest
from diffc.commands.mix.run import mix
from diffc.errors import UsageError
from diffc.progress import Silent
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of


@pytest.mark.slow
def test_a_mix_is_within_its_size_and_no_worse_than_any_format_of_that_size(tmp_path: Path) -> None:
    request = MixRequest(
        "tiny-sd3",
        tmp_path / "mixed",
        bits=6.0,
        formats=("nvfp4", "int8"),
        prompts=("a red fox",),
        steps=2,
        batch_size=1,
        image_size=64,
        plot=tmp_path / "a.svg",
    )
    best, *uniform = mix(request, Silent())
    assert best.bits <= 6
    assert [one.name for one in uniform] == ["nvfp4", "int8"]
    assert all(best.noise < one.noise for one in uniform if one.bits <= 6)
    assert (tmp_path / "a.svg").stat().st_size > 1000
    plan = tmp_path / "mixed.plan.json"
    formats = json.loads(plan.read_text(encoding="utf-8"))["formats"]
    projections = [formats[f"transformer_blocks.0.attn.to_{name}"] for name in "qkv"]
    assert len(set(projections)) == 1
    quantized = {path for path, name in formats.items() if name != "none"}
    found = Checkpoint.load(tmp_path / "mixed")
    assert {layer_of(name) for name in found.settings} == quantized
    edited = {**formats, sorted(quantized)[0]: "none"}
    plan.write_text(json.dumps({"formats": edited}), encoding="utf-8")
    again = replace(request, output=tmp_path / "edited", bits=None, plan=plan, plot=None)
    assert mix(again, Silent()) == []
    layers = {layer_of(name) for name in Checkpoint.load(tmp_path / "edited").settings}
    assert layers == quantized - {sorted(quantized)[0]}


def test_one_limit_is_asked_for(tmp_path: Path) -> None:
    for request in (MixRequest("tiny-sd3", tmp_path), MixRequest("tiny-sd3", tmp_path, bits=5.0, size=10**9)):
        with pytest.raises(UsageError, match="one of --bits, --size and --plan"):
            mix(request, Silent())
