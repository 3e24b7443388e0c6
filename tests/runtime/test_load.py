"""diffc.load: the compiled backbone inside diffusers' own pipelines, and everything that it must refuse."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import diffc
from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import find_family
from diffc.models.spec import Shape
from diffc.runtime.module import CompiledBackbone
from tests.conftest import Cells

NAMES = ("digits-sd3", "digits-flux", "digits-sdxl")
COMPONENT = {"digits-sd3": "transformer", "digits-flux": "transformer", "digits-sdxl": "unet"}
SMALL = {"targets": ("ort",), "sms": (), "dtype": "float32", "skip_validation": True}
NO_GUIDANCE: dict[str, dict[str, Any]] = {
    "digits-sd3": {"guidance_scale": 1.0},
    "digits-flux": {},
    "digits-sdxl": {"guidance_scale": 1.0},
}
GUIDANCE: dict[str, dict[str, Any]] = {
    "digits-sd3": {"guidance_scale": 5.0},
    "digits-flux": {"guidance_scale": 3.0, "true_cfg_scale": 2.0, "negative_prompt": ["a two"] * 4},
    "digits-sdxl": {"guidance_scale": 5.0},
}


def load(compiled: Cells, name: str) -> CompiledBackbone:
    return diffc.load(compiled(name, "none", **SMALL).folder)


def inputs(module: CompiledBackbone, family: str, shape: Shape, seed: int) -> dict[str, Any]:
    spec = find_family(family)
    values = random_inputs(spec, module.config, shape, dtype=torch.float32, seed=seed)
    return forward_kwargs(spec, module.config, values)


def paint(pipe: Any, prompts: list[str], width: int, settings: dict[str, Any]) -> torch.Tensor:
    images: torch.Tensor = pipe(
        prompts,
        num_inference_steps=2,
        height=64,
        width=width,
        generator=torch.Generator().manual_seed(11),
        output_type="pt",
        **settings,
    ).images
    return images


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_pipelines_run_on_it(name: str, compiled: Cells) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(materialize(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    digits = ["a handwritten three", "a handwritten nine", "a handwritten zero", "an eight"]
    cases = [(digits[:1], 64, NO_GUIDANCE[name]), (digits, 96, GUIDANCE[name])]
    expected = [paint(pipe, *case) for case in cases]
    with load(compiled, name) as module:
        setattr(pipe, COMPONENT[name], module)
        pipe.to("cpu")
        assert (pipe.device.type, pipe.dtype) == ("cpu", torch.float32)
        for case, reference in zip(cases, expected, strict=True):
            assert torch.allclose(paint(pipe, *case), reference, atol=2e-3)
        assert not torch.allclose(expected[0], expected[1][:1, :, :, :64], atol=0.1)
        offloads: list[Callable[[], Any]] = [
            lambda: pipe.enable_model_cpu_offload(device="cpu"),
            lambda: pipe.enable_sequential_cpu_offload(device="cpu"),
        ]
        for offload in offloads:
            with pytest.raises(DiffcError, match="cannot be offloaded"):
                offload()
            pipe.remove_all_hooks()
        assert torch.allclose(paint(pipe, *cases[0]), expected[0], atol=2e-3)


@pytest.fixture
def sd3(compiled: Cells) -> CompiledBackbone:
    return load(compiled, "digits-sd3")


def test_forms_of_the_call_agree(sd3: CompiledBackbone) -> None:
    given = inputs(sd3, "sd3", Shape(2, 64, 64, 24), 1)
    (expected,) = sd3(**given, return_dict=False)
    assert expected.shape == given["hidden_states"].shape
    assert torch.equal(sd3(**given).sample, expected)
    assert torch.equal(
        sd3(*given.values(), joint_attention_kwargs={}, block_controlnet_hidden_states=None).sample, expected
    )
    strided = given | {"hidden_states": given["hidden_states"].transpose(2, 3).contiguous().transpose(2, 3)}
    assert torch.equal(sd3(**strided).sample, expected)
    half = sd3(**(given | {"hidden_states": given["hidden_states"].half()})).sample
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), expected, atol=2e-2)


def test_the_place_in_the_loop_may_be_told(sd3: CompiledBackbone) -> None:
    """WAN's pipeline names the step and its noise with the branch of guidance."""
    given = inputs(sd3, "sd3", Shape(1, 64, 64, 20), 3)
    with sd3.cache_context("cond", step_index=0, sigma=torch.tensor(0.7)):
        told = sd3(**given)[0]
    assert torch.equal(told, sd3(**given)[0])


def test_results_are_new_tensors(sd3: CompiledBackbone) -> None:
    first = inputs(sd3, "sd3", Shape(1, 64, 64, 24), 1)
    result = sd3(**first).sample
    kept = result.clone()
    other = sd3(**inputs(sd3, "sd3", Shape(1, 64, 64, 24), 2)).sample
    assert not torch.allclose(other, kept)
    assert torch.equal(result, kept)


def test_threads_with_other_shapes_do_not_disturb_each_other(sd3: CompiledBackbone) -> None:
    shapes = [Shape(1, 64, 64, 24), Shape(3, 64, 96, 40)]
    given = [inputs(sd3, "sd3", shape, seed) for seed, shape in enumerate(shapes)]
    alone = [sd3(**g).sample for g in given]
    results: list[list[torch.Tensor]] = [[], []]

    def work(index: int) -> None:
        for _ in range(10):
            results[index].append(sd3(**given[index]).sample)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 10
        assert all(torch.equal(result, alone[index]) for result in results[index])


def _wider(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"pooled_projections": torch.randn(2, 129)}


def _other_batch(given: dict[str, Any]) -> dict[str, Any]:
    return given | {
        "timestep": torch.tensor([3.0, 4.0, 5.0])
    }  # one time would serve every image, as in torch


def _odd(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"hidden_states": torch.randn(2, 16, 9, 8)}


def _missing(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "timestep"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wider, "pooled_projections has shape"),
        (_other_batch, "timestep has shape"),
        (_odd, "multiples of 2"),
        (_missing, "no value for timestep"),
        (
            lambda given: given | {"joint_attention_kwargs": {"scale": 0.5}},
            "no input for joint_attention_kwargs",
        ),
        (
            lambda given: given | {"block_controlnet_hidden_states": [torch.ones(1)]},
            "no input for block_controlnet",
        ),
        (lambda given: given | {"skip_layers": [1]}, "no input for skip_layers"),
        (lambda given: given | {"hidden_states": torch.ones(2, 16, 8, 8, device="meta")}, "is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, sd3: CompiledBackbone
) -> None:
    given = inputs(sd3, "sd3", Shape(2, 64, 64, 24), 1)
    sd3(**given)
    with pytest.raises(DiffcError, match=message):
        sd3(**change(given))


def test_it_stays_on_its_device_and_follows_types(sd3: CompiledBackbone) -> None:
    with pytest.raises(DiffcError, match="stays where it was loaded"):
        sd3.to("meta")
    assert sd3.to("cpu", torch.float16).dtype == torch.float16
    assert sd3.float().dtype == torch.float32
    assert not list(sd3.parameters())


def test_a_closed_one_says_so(compiled: Cells) -> None:
    with load(compiled, "digits-sd3") as module:
        given = inputs(module, "sd3", Shape(1, 64, 64, 24), 1)
    with pytest.raises(DiffcError, match="closed"):
        module(**given)


def test_the_unet_takes_times_as_diffusers_does(compiled: Cells) -> None:
    module = load(compiled, "digits-sdxl")
    assert module.add_embedding.linear_1.in_features == module.config.projection_class_embeddings_input_dim
    given = inputs(module, "sdxl", Shape(2, 64, 64, 24), 1) | {"timestep": torch.tensor(500.0)}
    expected = module(**given).sample
    for time in (500, torch.tensor([500]), torch.tensor(500)):
        assert torch.equal(module(**(given | {"timestep": time})).sample, expected)
    assert not torch.equal(module(**(given | {"timestep": 20})).sample, expected)
    with pytest.raises(DiffcError, match="timestep has shape"):
        module(**(given | {"timestep": torch.tensor([500, 20])}))
    extra = given["added_cond_kwargs"] | {"image_embeds": torch.ones(1)}
    with pytest.raises(DiffcError, match=r"added_cond_kwargs\.image_embeds"):
        module(**(given | {"added_cond_kwargs": extra}))


def test_importing_diffc_and_what_rewrites_files_imports_no_torch() -> None:
    code = """
import sys, diffc, diffc.cli.main, diffc.commands.optimize
assert "torch" not in sys.modules
assert callable(diffc.load)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
