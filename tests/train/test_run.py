"""A whole training of a tiny model: better than calibration, taken up after a stop, compiled with one command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import DiffcError
from diffc.models.sources.locate import locate
from diffc.progress import Silent
from diffc.quantize.checkpoint import Checkpoint
from diffc.tensors import tensor_of
from diffc.train import run as train_run
from diffc.train.request import TrainRequest, TrainResult
from diffc.train.workspace import place_of

REQUEST = TrainRequest(
    "tiny-sd3",
    Path(),
    "nvfp4",
    steps=12,
    rate=3e-4,
    batch_size=4,
    teacher_images=5,
    teacher_steps=2,
    teacher_batch=4,
    image_size=64,
    text_tokens=16,
    every=4,
    prompts=("a fox", "a sign", "an owl", "a map", "a boat"),
    device="cpu",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    output = tmp_path_factory.mktemp("train") / "out"
    return train_run.train(replace(REQUEST, output=output), Silent())


def test_training_gains_and_says_so(trained: TrainResult) -> None:
    assert trained.trained
    assert trained.after.snr > trained.before.snr + 0.1
    assert [j.step for j in trained.curve] == [4, 8, 12]
    assert trained.after.snr >= max(j.snr for j in trained.curve) - 0.02  # what is stored is what was judged
    written = json.loads((trained.output / "training.json").read_text(encoding="utf-8"))
    assert written["after"]["snr"] == trained.after.snr
    assert not place_of(trained.output).exists()
    checkpoint = Checkpoint.load(trained.output)
    assert len(checkpoint.weights) == trained.carried > 20
    assert checkpoint.calibration["training"]["method"] == "qad"
    source = locate("tiny-sd3")
    assert checkpoint.source == source.fingerprint
    assert checkpoint.weights.keys() <= source.weights.keys()


def test_a_checkpoint_is_not_replaced_unasked(trained: TrainResult) -> None:
    with pytest.raises(DiffcError, match="exists"):
        train_run.train(replace(REQUEST, output=trained.output), Silent())


class StopAt(Silent):
    """A reporter that stops the work at a step of a stage."""

    def __init__(self, title: str, step: int) -> None:
        self.title, self.step = title, step

    def stage(self, title: str) -> Any:
        inner = super().stage(title)
        reporter = self

        class Stage:
            def __enter__(self) -> Any:
                inner.__enter__()
                return self.update

            def __exit__(self, *error: Any) -> Any:
                return inner.__exit__(*error)

            def update(self, done: int, _: int) -> None:
                if title.startswith(reporter.title) and done == reporter.step:
                    raise KeyboardInterrupt

        return Stage()


def test_a_stopped_training_goes_on_and_ends_alike(trained: TrainResult, tmp_path: Path) -> None:
    request = replace(REQUEST, output=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train_run.train(request, StopAt("train qad", 10))
    assert not request.output.exists()
    assert place_of(request.output).is_dir()
    notes: list[str] = []
    reporter = Silent()
    reporter.note = notes.append  # type: ignore[method-assign]
    again = train_run.train(request, reporter)
    assert any(note.startswith("going on with a training that was stopped") for note in notes)
    assert again.curve == trained.curve
    for name in ("checkpoint.json", "quantizers.safetensors", "weights.safetensors"):
        assert (request.output / name).read_bytes() == (trained.output / name).read_bytes()


@pytest.mark.compiles
@pytest.mark.slow
def test_what_is_trained_compiles_with_one_command(trained: TrainResult, tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    request = CompileRequest("tiny-sd3", output, "nvfp4", ("ort",), from_checkpoint=trained.output)
    result = compile_model(request)
    assert all(report.passed for report in result.validation)
    carried = Checkpoint.load(output / "checkpoint").weights
    assert len(carried) == trained.carried
    assert "checkpoint/weights.safetensors" in result.artifact.manifest["files"]
    model = onnx.load(output / "model.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    name = "time_text_embed.timestep_embedder.linear_1.bias"
    values = onnx.numpy_helper.to_array(stored[name]).astype(np.float32)
    expected = tensor_of(carried[name]).numpy().astype(np.float16).astype(np.float32)
    assert np.array_equal(values, expected)
