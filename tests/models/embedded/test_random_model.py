"""Released configurations with random weights: as large as the releases, seeded by tensor, readable by all."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from diffc.cli.main import run
from diffc.errors import DiffcError
from diffc.models.embedded import random_model, random_weights
from diffc.models.embedded.random_model import NOTE, make, make_random
from diffc.models.embedded.random_weights import Tensor, distribution, values
from diffc.models.embedded.real import REAL
from diffc.models.sources.locate import locate

SHAPES = {
    "pos_embed.pos_embed": (1, 36, 64),
    "block.0.attn.to_q.weight": (512, 300),
    "block.0.attn.to_q.bias": (512,),
    "block.0.norm.weight": (512,),
    "block.1.attn.to_q.weight": (512, 3000),
    "block.2.proj.weight": (40, 3, 2, 2),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of tensors in place of a backbone, in files of 1 MB."""
    monkeypatch.setattr(random_model, "shapes_of", lambda _: SHAPES)
    monkeypatch.setattr(random_model, "_SHARD", 1_000_000)


def read(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_tensor(key).float().numpy() for key in tensors.keys()}  # noqa: SIM118  # no dict
    return found


@pytest.mark.usefixtures("small")
def test_a_folder_is_what_diffusers_writes(tmp_path: Path) -> None:
    folder = make_random("flux-dev", tmp_path / "flux", seed=4)
    tensors = read(folder)
    assert {name: array.shape for name, array in tensors.items()} == SHAPES
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * array.size for array in tensors.values())
    assert set(index["weight_map"]) == set(SHAPES)
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) == 3
    source = locate(str(folder))
    assert source.family.name == "flux"
    assert dict(source.config) == REAL["flux-dev"].config
    assert [p.name for p in tmp_path.iterdir()] == ["flux"]


@pytest.mark.usefixtures("small")
def test_values_are_fixed_by_seed_and_name_and_look_trained(tmp_path: Path) -> None:
    first = read(make_random("sd3-medium", tmp_path / "a", seed=1))
    for name, array in first.items():
        mean, std = distribution(Tensor(name, array.shape, "float16"))
        assert abs(array.mean() - mean) < 5 * std / np.sqrt(array.size)
        assert abs(array.std() / std - 1) < 5 / np.sqrt(array.size)
    assert 0.02 <= first["block.1.attn.to_q.weight"].std() < 0.0205
    assert abs(first["block.0.norm.weight"].mean() - 1) < 0.02
    order = dict(reversed(SHAPES.items()))
    for name, shape in order.items():
        alone = np.concatenate(list(values(Tensor(name, shape, "float16"), "sd3-medium/1")))
        np.testing.assert_array_equal(alone.reshape(shape).astype(np.float32), first[name])
    other = read(make_random("sd3-medium", tmp_path / "b", seed=2))
    assert all((other[name] != first[name]).mean() > 0.9 for name in SHAPES)
    correlation = np.corrcoef(first["block.0.attn.to_q.bias"], first["block.0.norm.weight"])[0, 1]
    assert abs(correlation) < 0.2


@pytest.mark.usefixtures("small")
def test_equal_calls_give_equal_bytes_and_a_finished_folder_stays(tmp_path: Path) -> None:
    one = make_random("sdxl", tmp_path / "a")
    two = make_random("sdxl", tmp_path / "b")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    before = {p.name: p.stat().st_mtime_ns for p in one.iterdir()}
    assert make_random("sdxl", one) == one
    assert {p.name: p.stat().st_mtime_ns for p in one.iterdir()} == before
    with pytest.raises(DiffcError, match="exists and is not sdxl of seed 3"):
        make_random("sdxl", one, seed=3)
    (one / NOTE).unlink()
    with pytest.raises(DiffcError, match="exists and is not sdxl"):
        make_random("sdxl", one)


@pytest.mark.usefixtures("small")
def test_without_room_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1_000_000))
    with pytest.raises(DiffcError, match=r"no room on the disk .* 0\.0 GB are needed, 0\.0 GB are free"):
        make_random("flux-dev", tmp_path / "flux")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(random_weights, "safetensors_header", broken)
    with pytest.raises(DiffcError, match="cannot write flux-dev"):
        make_random("flux-dev", tmp_path / "flux")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("flux-dev", False, "configuration of flux-dev, not its weights.*--random-weights"),
        ("tiny-flux", True, "tiny-flux comes with its weights"),
        ("flux-pro", True, "unknown model 'flux-pro'"),
    ],
)
def test_names_and_the_flag_must_fit(name: str, flag: bool, message: str, tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match=f"(?s){message}"):
        make(name, tmp_path / "x", random_weights=flag)
    assert not list(tmp_path.iterdir())


def test_the_command_line_lists_and_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["models", "list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in REAL)
    assert "11.90 B" in text
    monkeypatch.setattr(random_model, "shapes_of", lambda _: SHAPES)
    assert run(["models", "make", "flux-dev", "--random-weights", str(tmp_path / "x"), "--seed", "5"]) == 0
    assert json.loads((tmp_path / "x" / NOTE).read_text())["seed"] == 5
    assert read(tmp_path / "x").keys() == SHAPES.keys()
