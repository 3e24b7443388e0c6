"""The embedded models: complete, loadable without a network, deterministic, and with numbers that tell."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffc.errors import DiffcError
from diffc.models.embedded import catalogue as embedded
from diffc.models.embedded.catalogue import EMBEDDED, MANIFEST, make, materialize, native_of
from diffc.models.registry import FAMILIES

NAMES = sorted(name for name, model in EMBEDDED.items() if model.family in FAMILIES)
"""Those with a family file; tests/models/embedded/test_digits.py has the others."""
# SD3's last block drops its text stream: diffusers computes that query for nothing, and so do releases.
SD3_UNUSED = "transformer_blocks.2.attn.add_q_proj.weight"
PROMPTS = ("a photo of a cat", 'Two "robots" paint 猫 on a wall; it\'s raining, 90% grey & cold')


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedded")
    return {name: make(name, root / name) for name in NAMES}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def load_backbone(name: str, folder: Path) -> Any:
    """The backbone in float32."""
    import diffusers

    kinds = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel", "sdxl": "UNet2DConditionModel"}
    model = EMBEDDED[name]
    return getattr(diffusers, kinds[model.family]).from_pretrained(folder / model.component)


def backbone_inputs(family: str, seed: int) -> dict[str, Any]:
    """Unit-normal inputs of two samples, times in the middle and near the end of the schedule."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if family == "sd3":
        return {
            "hidden_states": normal(2, 16, 16, 12),
            "encoder_hidden_states": normal(2, 40, 128),
            "pooled_projections": normal(2, 128),
            "timestep": torch.tensor([500.0, 20.0]),
        }
    if family == "flux":
        rows = torch.arange(48) // 8
        return {
            "hidden_states": normal(2, 48, 64),
            "encoder_hidden_states": normal(2, 32, 128),
            "pooled_projections": normal(2, 64),
            "timestep": torch.tensor([0.5, 0.02]),
            "guidance": torch.tensor([3.5, 1.0]),
            "txt_ids": torch.zeros(32, 3),
            "img_ids": torch.stack([torch.zeros(48), rows, torch.arange(48) % 8], dim=-1),
        }
    sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128], [96, 64, 8, 0, 128, 128]])
    return {
        "sample": normal(2, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(2, 77, 128),
        "added_cond_kwargs": {"text_embeds": normal(2, 64), "time_ids": sizes},
    }


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_loads_offline_and_paints_what_the_prompt_says(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    def refuse(*_: object) -> None:
        raise AssertionError("an embedded model opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    pipeline.set_progress_bar_config(disable=True)
    short = {"max_sequence_length": 48} if EMBEDDED[name].family != "sdxl" else {}
    images = [
        pipeline(
            prompt,
            height=64,
            width=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
            **short,
        ).images[0]
        for prompt in PROMPTS
    ]
    assert images[0].shape == (64, 64, 3)
    assert np.isfinite(images).all()
    assert all(0.05 < image.std() < 0.45 for image in images)  # neither flat nor clipped to black and white
    assert np.abs(images[0] - images[1]).mean() > 1e-3  # same noise: nothing, were the prompt lost


@pytest.mark.parametrize("name", NAMES)
def test_backbone_is_stored_small_in_the_type_of_its_release(name: str, folders: dict[str, Path]) -> None:
    from safetensors import safe_open

    path = folders[name] / EMBEDDED[name].component / "diffusion_pytorch_model.safetensors"
    expected = {"float16": "F16", "bfloat16": "BF16"}[EMBEDDED[name].dtype]
    with safe_open(path, framework="numpy") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {expected}  # noqa: SIM118
    assert path.stat().st_size < 20e6


@pytest.mark.parametrize("name", NAMES)
def test_backbone_output_has_scale_and_survives_16_bits(name: str, folders: dict[str, Path]) -> None:
    import torch

    family = EMBEDDED[name].family
    model = load_backbone(name, folders[name])
    inputs = backbone_inputs(family, seed=11)
    with torch.no_grad():
        full = model(**inputs).sample
        assert 0.1 < full.std() < 10
        for dtype, tolerance in ((torch.float16, 4e-3), (torch.bfloat16, 4e-2)):
            half = model.to(dtype)(**_cast(inputs, dtype)).sample.float()
            assert (half - full).norm() < tolerance * full.norm()
            model.float()


def _cast(inputs: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Everything but integers and positions, which the pipelines keep in float32."""
    keep = ("txt_ids", "img_ids", "time_ids")
    return {
        k: _cast(v, dtype)
        if isinstance(v, dict)
        else v
        if k in keep or not v.is_floating_point()
        else v.to(dtype)
        for k, v in inputs.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_shows_in_the_output(name: str, folders: dict[str, Path]) -> None:
    """Losing a matrix moves the output by thirty times what validation and the pass check allow (1e-5).

    It cannot move it by more than the plain comparison of quantized models allows (2e-3) without such models
    being chaotic: what one layer does to the output, a value that rounds the other way in it does as well.
    Of the UNet's 174 matrices every fifth is tried, for time.
    """
    import torch

    model = load_backbone(name, folders[name])
    inputs = _first_sample(backbone_inputs(EMBEDDED[name].family, seed=12))
    with torch.no_grad():
        full = model(**inputs).sample
        matrices = [(key, p) for key, p in model.named_parameters() if p.ndim > 1]
        for key, parameter in matrices[:: 5 if name == "tiny-sdxl" else 1]:
            if EMBEDDED[name].family == "sd3" and key == SD3_UNUSED:
                continue
            kept = parameter.detach().clone()
            parameter.zero_()
            changed = (model(**inputs).sample - full).norm() / full.norm()
            parameter.copy_(kept)
            assert changed > 3e-4, key


def _first_sample(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _first_sample(v)
        if isinstance(v, dict)
        else v
        if k.endswith("_ids") and v.ndim < 3 and k != "time_ids"
        else v[:1]
        for k, v in inputs.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_torchs_state(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = make(name, tmp_path / "again")
    finally:
        torch.set_num_threads(threads)
    assert contents(again) == contents(folders[name])
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_materialize_one_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    code = "from diffc.models.embedded.catalogue import materialize; print(materialize('tiny-sd3'))"
    environment = os.environ | {"DIFFC_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(printed) == 1
    folder = Path(printed.pop())
    assert contents(folder) == contents(folders["tiny-sd3"])
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no temporary folder left


def test_materialize_makes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFC_CACHE", str(tmp_path))
    folder = materialize("tiny-flux")
    assert folder.is_relative_to(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert materialize("tiny-flux") == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == stamps


def test_make_keeps_an_equal_folder_and_refuses_others(folders: dict[str, Path], tmp_path: Path) -> None:
    assert make("tiny-sd3", folders["tiny-sd3"]) == folders["tiny-sd3"]
    with pytest.raises(DiffcError, match="exists and is not tiny-flux"):
        make("tiny-flux", folders["tiny-sd3"])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DiffcError, match="exists and is not tiny-sd3"):
        make("tiny-sd3", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_lost_a_file_is_not_taken(tmp_path: Path) -> None:
    folder = make("tiny-sd3", tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DiffcError, match="exists and is not tiny-sd3"):
        make("tiny-sd3", folder)


def test_make_into_an_unusable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DiffcError, match=r"cannot write tiny-sd3[\s\S]*DIFFC_CACHE"):
        make("tiny-sd3", tmp_path / "file" / "model")


def test_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match=r"tiny-sd9.*tiny-sd3, tiny-sd35, tiny-flux, tiny-sdxl"):
        make("tiny-sd9", tmp_path / "x")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("win32", {"LOCALAPPDATA": "local"}, Path("local/diffc/Cache")),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, Path("xdg/diffc")),
        ("linux", {"HOME": "home", "USERPROFILE": "home"}, Path("home/.cache/diffc")),
    ],
)
def test_cache_place(
    platform: str, variables: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DIFFC_CACHE", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert embedded.cache_dir() == expected


def test_the_native_size_is_read_from_the_folder_of_an_embedded_model_alone(tmp_path: Path) -> None:
    assert native_of(tmp_path) == {}
    stated: Any = {"native": {"height": 32, "width": "32", "frames": 9, "batch": 4}}
    (tmp_path / MANIFEST).write_text(json.dumps(stated), encoding="utf-8")
    assert native_of(tmp_path) == {"height": 32, "frames": 9}
    (tmp_path / MANIFEST).write_text("[]", encoding="utf-8")
    assert native_of(tmp_path) == {}
