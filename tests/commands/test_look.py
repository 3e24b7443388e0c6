"""What `diffc inspect` says of a file: layers by kind, missing parts, and the command that compiles it."""

from __future__ import annotations

import re
import shlex
from itertools import cycle
from pathlib import Path

from diffc.commands.look import layer_rule, look
from diffc.models.sources.locate import locate
from tests.models.single.releases import released, save
from tests.models.stored.quantized import MAKERS, quantized


def test_a_quantized_file(tmp_path: Path) -> None:
    kinds = cycle(MAKERS)
    matrix = re.compile(r"(double|single)_blocks\.\d+\.(img_mlp|linear2)")
    state = quantized(released("tiny-flux")[0], lambda name: next(kinds) if matrix.match(name) else "")
    source = locate(str(save(state, tmp_path / "a model.safetensors")))
    found = look(source)
    layers = [name for names in found.kinds.values() for name in names]
    assert sorted(layers) == sorted(source.held)
    assert set(found.kinds) == {
        "fp8, inputs fp8",
        "fp8",
        "int8, inputs int8",
        "nvfp4, inputs nvfp4",
        "mxfp8, inputs mxfp8",
    }
    assert found.missing == ("text encoder", "VAE")
    words = shlex.split(found.command)
    assert words[:3] == ["diffc", "compile", str(tmp_path / "a model.safetensors")]
    assert words[words.index("--format") + 1] == "stored"
    assert source.nbytes < sum(recipe.nbytes for recipe in source.weights.values())


def test_a_plain_file_and_a_pipeline(tmp_path: Path) -> None:
    plain = locate(str(save(released("tiny-sd3")[0], tmp_path / "sd3.safetensors")))
    assert not look(plain).kinds
    assert "--calibrate synthetic" in look(plain).command
    pipeline = look(locate("tiny-sd3"))
    assert pipeline.missing == ()
    assert "--calibrate" not in pipeline.command


def test_layers_that_differ_in_numbers_alone_are_one() -> None:
    names = ["a.0.to_q", "a.1.to_q", "b.to_q"]
    assert layer_rule(names) == "a.*.to_q (2), b.to_q"
