"""optimum-onnx's own pipelines on packaged folders, in their environment, against diffusers (slow)."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffc.artifact.folder import Artifact
from diffc.commands.package.request import PackageRequest
from diffc.commands.package.run import package
from diffc.compile.spine import CompileRequest, compile_model
from tests import ROOT
from tools.optimum import env, images

_TOOLS = ("diffc", "tools/optimum/env.py", "tools/optimum/images.py")
PROMPTS = ("a handwritten seven", "a handwritten three")
STEPS, SIZE = 8, 64
LATENTS = {"digits-sd3": (2, 16, 8, 8), "digits-flux": (2, 16, 64), "digits-sdxl": (2, 4, 8, 8)}
GUIDANCE = {"digits-sd3": 4.0, "digits-flux": 3.5, "digits-sdxl": 4.0}

# Root mean square over pixels in 0..1. Components and backbone are float16 on one side and float32 on the other:
# 0.00025 measured. In FP8 that rounding moves values to the next step of a quantizer, and eight steps carry
# it on: 0.042 (SD3), 0.003 (FLUX), 0.015 (SDXL) measured, with every digit read as asked on both sides.
TOLERANCE = {"none": 0.002, "fp8": 0.08}


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of the environment: DIFFC_OPTIMUM_ENV, or .venv-optimum, made on the first call."""
    folder = Path(os.environ.get("DIFFC_OPTIMUM_ENV") or ROOT / ".venv-optimum")
    assert env.main(["test" if env.python_of(folder).exists() else "make", "--folder", str(folder)]) == 0
    found: Path = env.python_of(folder)
    return found


def diffusers_images(model: str, artifact: Artifact, latents: np.ndarray, quantized: bool) -> np.ndarray:
    """The torch pipeline in float32, with ModelOpt's simulated quantizers where the artifact has some."""
    import torch
    from diffusers import DiffusionPipeline

    from diffc.models.sources.locate import locate
    from diffc.quantize.checkpoint import Checkpoint
    from diffc.validate.torch_reference import TorchReference

    source = locate(model)
    pipeline: Any = DiffusionPipeline.from_pretrained(source.pipeline_dir, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if quantized:
        checkpoint = Checkpoint.load(artifact.folder / "checkpoint")
        reference = TorchReference(source, "float32", checkpoint)
        component = "unet" if model == "digits-sdxl" else "transformer"
        setattr(pipeline, component, reference.model)
    given = pipeline(
        list(PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE[model],
        height=SIZE,
        width=SIZE,
        latents=torch.from_numpy(latents),
        output_type="np",
    )
    images: np.ndarray = given.images
    return images


@pytest.mark.slow
@pytest.mark.parametrize("format", ["none", "fp8"])
@pytest.mark.parametrize("model", LATENTS)
def test_optimum_gives_the_images_of_diffusers(model: str, format: str, python: Path, tmp_path: Path) -> None:
    request = CompileRequest(model, tmp_path / "artifact", format, dtype="float16", steps=4)
    artifact = compile_model(request).artifact
    package(PackageRequest(artifact.folder, tmp_path / "package"))
    latents = np.random.default_rng(3).standard_normal(LATENTS[model]).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)
    command = [str(python), str(ROOT / "tools" / "optimum" / "images.py"), str(tmp_path / "package")]
    command += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    command += ["--steps", str(STEPS), "--size", str(SIZE), "--guidance", str(GUIDANCE[model])]
    command += ["--latents", str(tmp_path / "latents.npy"), "--out", str(tmp_path / "images.npy")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    got = np.load(tmp_path / "images.npy")
    want = diffusers_images(model, artifact, latents, quantized=format != "none")
    assert got.shape == want.shape == (2, SIZE, SIZE, 3)
    error = float(np.sqrt(np.mean((got - want) ** 2)))
    apart = float(np.sqrt(np.mean((got - want[::-1]) ** 2)))
    print(f"{model} {format}: {error:.5f}, the other prompt's picture {apart:.3f}")
    assert error < TOLERANCE[format] < apart / 2


def test_the_environments_script_reads_its_constraints(tmp_path: Path) -> None:
    pinned = dict(
        line.split("==") for line in env.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")
    )
    assert pinned["optimum-onnx"] == "0.1.0"
    assert {name for name in env.PACKAGES if name not in pinned} == set()
    command = env.install_command(tmp_path, rtx=True)
    assert "onnxruntime-gpu" not in command
    assert env.RTX in command
    assert env.main(["test", "--folder", str(tmp_path)]) == 1  # no environment there


def test_profile_options_name_every_input_of_the_backbone(tmp_path: Path) -> None:
    shapes = {"sample": [1, 4, 8, 8], "timestep": [], "time_ids": [1, 6]}
    manifest = {"input_shapes": dict.fromkeys(("min", "opt", "max"), shapes)}

    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert images.profile(tmp_path) == {
        f"nv_profile_{key}_shapes": "sample:1x4x8x8,time_ids:1x6" for key in ("min", "opt", "max")
    }


def test_the_commands_of_the_page_are_those_of_the_tools() -> None:
    """They run in the slow test and in test_package.py with other paths; here every option must exist."""
    from typer.main import get_command

    from diffc.cli.main import app

    page = (ROOT / "docs" / "windows-rtx.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line.replace("\\", "/")) for block in blocks for line in block.splitlines()]
    seen = set()
    for words in lines:
        tool = next((name for word in words for name in _TOOLS if f"/{word}".endswith(f"/{name}")), None)
        if tool == "diffc" and "pip" not in words[0]:
            group: Any = get_command(app)
            command = group.commands[words[1]]
            command.make_context(words[1], words[2:])
        elif tool == "tools/optimum/env.py":
            assert env.parser().parse_args(words[words.index(tool) + 1 :])
        elif tool == "tools/optimum/images.py":
            assert images.parser().parse_args(words[words.index(tool) + 1 :])
        seen.add(tool)
    assert seen >= set(_TOOLS)
    assert {"compile", "package", "doctor"} <= {words[1] for words in lines if "diffc" in words[0]}
