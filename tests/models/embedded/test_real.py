"""The configurations of released models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffc.models.capture.pipeline import empty_model
from diffc.models.embedded import random_model
from diffc.models.embedded.random_model import make_random, shapes_of
from diffc.models.embedded.random_weights import Tensor
from diffc.models.embedded.real import PIPELINES, REAL
from diffc.models.sources.locate import locate
from diffc.progress import Reporter


@pytest.mark.parametrize("name", REAL)
def test_the_configuration_has_the_parameters_of_the_release(name: str) -> None:
    """SDXL 2.57 B, SD3 2.03 B, SD3.5 2.24 B, FLUX 11.9 B; a table of positions is stored beside them."""
    model = REAL[name]
    sizes = {key: np.prod(shape, dtype=np.int64) for key, shape in shapes_of(model).items()}
    buffers = sizes.pop("pos_embed.pos_embed", 0)
    assert sum(sizes.values()) == model.parameters
    assert buffers == {"sd3-medium": 192**2 * 1536, "sd35-medium": 384**2 * 1536}.get(name, 0)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_has_the_parameters_of_the_release(name: str, tmp_path: Path) -> None:
    """Stable Diffusion 1.5 860 M, LTX-Video 1.92 B, WAN 5.0 and 14.3 B, Qwen-Image 20.4 B, FLUX.2 32.2 B."""
    model = PIPELINES[name]
    for component in model.backbones:
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_text(json.dumps(model.parts[component]))
        empty = empty_model(tmp_path / component)
        assert type(empty).__name__ == model.backbone
        assert sum(parameter.numel() for parameter in empty.parameters()) == model.parameters


QUICK = "ltx-video"


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES]
)
def test_inputs_are_read_off_a_pipeline_of_configurations(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that `models make` writes, its weights left out: the family and every input are found."""
    monkeypatch.setattr(random_model, "write_weights", without_values)
    source = locate(str(make_random(name, tmp_path / name)))
    interface = source.family.interface
    assert interface is not None
    assert len(interface.inputs) >= 3
    assert source.parameters == PIPELINES[name].parameters


def without_values(folder: Path, tensors: list[Tensor], _seed: str, _ui: Reporter) -> None:
    """One sparse file of weights: the header, and a hole in the place of the values."""
    header, place = {}, 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": {"float16": "F16", "bfloat16": "BF16"}[tensor.dtype]}
        header[tensor.name] |= {"shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header).encode()
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
