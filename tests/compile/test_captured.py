"""A backbone without a family file from its folder to frames: compiled, loaded into its pipeline, run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffc import load
from diffc.artifact.folder import Artifact
from diffc.commands.generate import GenerateRequest, generate
from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import DiffcError
from diffc.models.sources.locate import locate
from diffc.models.sources.pipelines import open_pipeline
from tools.prove.family_models import MODELS, make
from tools.prove.family_rows import measured

CALL = {
    "prompt": ["a red fox asleep in fresh snow"],
    "height": 64,
    "width": 96,
    "num_frames": 17,
    "num_inference_steps": 2,
    "max_sequence_length": 40,
    "output_type": "latent",
}


@pytest.mark.compiles
def test_a_video_class_from_folder_to_frames(tmp_path: Path) -> None:
    folder = make("ltx", tmp_path, num_layers=1)
    request = CompileRequest(str(folder), tmp_path / "out", "none", ("ort",), dtype="float32")
    result = compile_model(request)
    assert {(s.shape.batch, s.shape.frames) for s in result.validation} == {(1, 9), (2, 25)}  # type: ignore[union-attr]
    manifest = Artifact.load(request.output).manifest
    assert manifest["model"]["family"] == "ltx"
    assert [i["name"] for i in manifest["inputs"]][-3:] == ["num_frames", "height", "width"]
    assert manifest["profile"]["optimum"]["frames"] == 161

    pipe = open_pipeline(locate(str(folder)), dtype=torch.float32, fix="")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(generator=torch.Generator().manual_seed(5), **CALL).frames
    pipe.transformer = load(request.output)
    found = pipe(generator=torch.Generator().manual_seed(5), **CALL).frames
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)
    with pytest.raises(
        DiffcError, match=r"rope_interpolation_scale.0 is .*, and the compiled ltx backbone holds"
    ):
        pipe(generator=torch.Generator().manual_seed(5), frame_rate=30, **CALL)

    asked = GenerateRequest(
        request.output, tmp_path / "film.webp", "a fox", steps=1, height=64, width=64, frames=9, warm_up=False
    )
    (painted,) = generate(asked)
    assert painted.images.shape == (9, 3, 64, 64)
    with Image.open(tmp_path / "film.webp") as film:
        assert film.n_frames > 1  # type: ignore[attr-defined]
    generate(replace(asked, output=tmp_path / "frames.png"))
    assert (tmp_path / "frames.png").is_file()


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("format", ["none", "int8", "fp8", "nvfp4"])
@pytest.mark.parametrize("model", MODELS)
def test_every_class_in_every_format(model: str, format: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert measured(model, format, "float16", tmp_path, ("trt-rtx", "ort"), (89, 120)).result == "ok"
