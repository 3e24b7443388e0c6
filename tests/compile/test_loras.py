"""Compiles with LoRAs: fused, exchanged without calibrating, and through slots, each against torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffc.artifact.folder import Artifact
from diffc.commands.relora import ReloraRequest, relora, relora_request
from diffc.compile.plan import check
from diffc.compile.request import CompileRequest
from diffc.compile.spine import compile_model
from diffc.errors import DiffcError, UnsupportedError
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sources.locate import locate, locate_again
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.spec import Shape
from diffc.quantize.checkpoint import Checkpoint
from diffc.runtime.load import load
from diffc.validate.torch_reference import reference_model
from tests.passes.weights.lora.files import arrays, written

FP32_REL_L2 = 2e-3  # diffc's limit for FP8 in float32: roundings near a step of the grid flip it
SHAPE = Shape(1, 64, 96, 24)
RANK, ALPHA = 4, 2.0
LAYERS = {
    "attn_to_q": (128, 128),
    "attn_to_out_0": (128, 128),
    "ff_net_0_proj": (512, 128),
    "ff_net_2": (128, 512),
}


def lora(path: Path, seed: int, scale: float = 0.05) -> Path:
    """A LoRA for tiny-sd3, as kohya spells diffusers' names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(2):
        for layer, (rows, columns) in LAYERS.items():
            name = f"lora_unet_transformer_blocks_{block}_{layer}"
            shapes |= {f"{name}.lora_up.weight": (rows, RANK), f"{name}.lora_down.weight": (RANK, columns)}
    tensors = {name: array * scale for name, array in arrays(shapes, seed).items()}
    alphas = {name.replace("lora_up.weight", "alpha"): np.float32(ALPHA) for name in tensors if "up" in name}
    return written(path, tensors | alphas)


@pytest.fixture(scope="module")
def slotted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-sd3 in FP8 with one LoRA in its weights and slots for others."""
    folder = tmp_path_factory.mktemp("lora")
    fused = lora(folder / "fused.safetensors", 1)
    compile_model(
        CompileRequest(
            "tiny-sd3",
            folder / "out",
            format="fp8",
            dtype="float32",
            calibrate="synthetic",
            loras=(LoraSpec(str(fused), 0.7),),
            lora_slots=2 * RANK,
            skip_validation=True,  # the test below compares it with torch
        )
    )
    return folder / "out"


def run(module: Any, source: Any) -> Any:
    values = random_inputs(source.family, source.config, SHAPE, dtype=torch.float32, seed=11)
    with torch.no_grad():
        return module(**forward_kwargs(source.family, source.config, values), return_dict=False)[0]


def with_branches(model: torch.nn.Module, file: Path, weight: float) -> None:
    """Add what the file holds beside the layers of a torch model, by hooks."""
    from safetensors.numpy import load_file

    tensors = load_file(file)
    flat = {name.replace(".", "_"): module for name, module in model.named_modules()}
    for key in (key for key in tensors if key.endswith(".lora_up.weight")):
        layer = key.removesuffix(".lora_up.weight")
        up, down = torch.from_numpy(tensors[key]), torch.from_numpy(tensors[f"{layer}.lora_down.weight"])
        delta = weight * ALPHA / RANK * up @ down
        flat[layer.removeprefix("lora_unet_")].register_forward_hook(
            lambda _, inputs, output, delta=delta: output + inputs[0] @ delta.T
        )


def distance(found: Any, wanted: Any) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.compiles
def test_slots_add_to_the_quantized_model_what_hooks_add_in_torch(slotted: Path, tmp_path: Path) -> None:
    artifact = Artifact.load(slotted)
    source = locate_again(artifact.manifest)
    (recorded,) = artifact.manifest["model"]["loras"]
    assert (recorded["weight"], recorded["parameters"]) == (0.7, 2 * len(LAYERS))
    model = reference_model(source, "float32", Checkpoint.load(slotted / "checkpoint"))
    first, second = (lora(tmp_path / f"{seed}.safetensors", seed, 0.15) for seed in (2, 3))
    with load(slotted, target="ort") as module:
        empty = run(module, source)
        assert distance(empty, run(model, source)) <= FP32_REL_L2
        assert "8 LoRA layers" in module.set_lora(first)[0]
        once = run(module, source)
        module.set_lora([first, first], [0.25, 0.75])
        assert distance(run(module, source), once) <= 1e-5
        module.set_lora([first, second], [0.5, -1.0])
        both = run(module, source)
        with pytest.raises(DiffcError, match="rank 12"):
            module.set_lora([first, second, second])
        assert torch.equal(run(module, source), both)
        module.set_lora()
        assert torch.equal(run(module, source), empty)
    with_branches(model, first, 0.5)
    with_branches(model, second, -1.0)
    assert distance(both, run(model, source)) <= FP32_REL_L2
    assert distance(both, once) > 10 * FP32_REL_L2
    assert distance(once, empty) > 10 * FP32_REL_L2


@pytest.mark.compiles
def test_relora_takes_the_calibration_and_finds_scales_of_changed_weights(
    slotted: Path, tmp_path: Path
) -> None:
    file = lora(tmp_path / "a.safetensors", 4, 0.2)
    result = relora(ReloraRequest(slotted, tmp_path / "out", (LoraSpec(str(file)),)))
    assert all(report.passed for report in result.validation)
    old, new = (Checkpoint.load(folder / "checkpoint") for folder in (slotted, tmp_path / "out"))
    differing = {path for path in old.amax if not np.array_equal(old.amax[path], new.amax[path])}
    assert differing
    assert all(path.endswith("weight_quantizer") for path in differing)
    back = relora_request(result.artifact, ReloraRequest(result.artifact.folder, tmp_path / "back"))
    assert (back.loras, back.format, back.calibrate, back.lora_slots) == ((), "fp8", "synthetic", 2 * RANK)
    assert check(back).source.fingerprint == locate("tiny-sd3").fingerprint


def test_slots_are_refused_before_any_work(tmp_path: Path) -> None:
    request = CompileRequest("tiny-sd3", tmp_path / "out", lora_slots=8)
    with pytest.raises(UnsupportedError, match="target ort alone"):
        check(replace(request, targets=("ort", "ort-cuda")))
    with pytest.raises(DiffcError, match="1 to 1024"):
        check(replace(request, lora_slots=5000))
    with pytest.raises(UnsupportedError, match="--cache-plan"):
        check(replace(request, cache_plan="deepcache:every=2"))
