"""A damage anywhere in a compile exits with code 3 and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from diffc.cli.main import run
from diffc.compile import graphs
from passes.weights.recipe import Recipe
from tests.validate.test_passes import Damage


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def compile_in(folder: Path, *more: str) -> int:
    return run(["compile", "tiny-sd3", "-o", str(folder / "out"), *more])


def test_a_damage_after_the_passes_exits_3_and_leaves_nothing(
    traced: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import diffc.compile.spine

    original = diffc.compile.spine.rewrite

    def damaging(*arguments: Any) -> Any:
        graphs = original(*arguments)
        tensor = initializer(graphs.models["model.onnx"], "transformer_blocks.1.attn.to_v.weight")
        recipe = Recipe.of_tensor(tensor)
        assert recipe is not None
        tensor.CopyFrom(recipe.multiply(Recipe.of_array(np.float32([1.05]))).to_tensor(tensor.name))
        return graphs

    monkeypatch.setattr(diffc.compile.spine, "trace", lambda *_: traced)
    monkeypatch.setattr(diffc.compile.spine, "rewrite", damaging)
    assert compile_in(tmp_path) == 3
    error = capsys.readouterr().err
    assert "the compiled model.onnx differs from torch: output 'out_hidden_states' at batch 1" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_wrong_pass_in_a_compile_exits_3_and_leaves_nothing(
    traced: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import diffc.compile.spine

    wrong = Damage(weight="transformer_blocks.1.attn.to_v.weight", factor=1.05)
    monkeypatch.setattr(diffc.compile.spine, "trace", lambda *_: traced)
    monkeypatch.setattr(graphs, "CANONICAL", (*graphs.CANONICAL, wrong))
    assert compile_in(tmp_path) == 3
    error = capsys.readouterr().err
    assert "pass 'damage-weight' changed output 'out_hidden_states': relative L2 error" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
