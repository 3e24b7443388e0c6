"""Components of a pipeline folder: variants of their files, and those that are absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.sources.components import check_components
from diffc.models.sources.locate import locate
from diffc.models.sources.pipelines import open_pipeline


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies an embedded pipeline to a folder that the test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(materialize(name), tmp_path / name))

    return copy


def renamed(pipeline: Path, *components: str) -> None:
    """Give the weights of `components` the names of the variant fp16."""
    for component in components:
        for file in (pipeline / component).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


def as_shards(folder: Path, index: str, shard: str) -> None:
    """Split the weights of a component in two: `shard` is the form of their names, with a place for the number."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    places = {}
    for number in (1, 2):
        part = {key: tensors[key] for key in sorted(tensors)[number - 1 :: 2]}
        save_file(part, folder / shard.format(number), metadata={"format": "pt"})
        places |= dict.fromkeys(part, shard.format(number))
    content = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / index).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "components", [("unet", "vae", "text_encoder", "text_encoder_2"), ("vae",), ("unet",)]
)
def test_variant_files_open_beside_plain_ones(
    copied: Callable[[str], Path], components: tuple[str, ...]
) -> None:
    pipeline = copied("tiny-sdxl")
    plain = {
        k: v.clone()
        for k, v in open_pipeline(locate(str(pipeline)), dtype=torch.float32, fix="x")
        .unet.state_dict()
        .items()
    }
    renamed(pipeline, *components)
    source = locate(str(pipeline))
    check_components(source)
    assert source.variant == "fp16"
    opened = open_pipeline(source, dtype=torch.float32, fix="x").unet.state_dict()
    assert all(torch.equal(opened[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("safetensors.index.fp16.json", ".fp16-0000{}-of-00002.safetensors"),
        ("safetensors.fp16.index.json", "-0000{}-of-00002.fp16.safetensors"),
        ("fp16.safetensors.index.json", ".fp16-0000{}-of-00002.safetensors"),
    ],
)
def test_shards_of_a_variant_open(copied: Callable[[str], Path], index: str, shard: str) -> None:
    pipeline = copied("tiny-sd3")
    before = locate(str(pipeline)).weights
    stem = "diffusion_pytorch_model"
    as_shards(pipeline / "transformer", f"{stem}.{index}", stem + shard)
    source = locate(str(pipeline))
    assert source.variant == "fp16"
    assert source.weights.keys() == before.keys()
    pipe = open_pipeline(source, dtype=torch.float32, fix="x")
    assert len(pipe.transformer.state_dict()) == len(before)


def test_an_index_that_diffusers_does_not_read_is_named(copied: Callable[[str], Path]) -> None:
    pipeline = copied("tiny-sd3")
    as_shards(
        pipeline / "vae",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
    )
    with pytest.raises(
        DiffcError, match=r"rename the file to diffusion_pytorch_model\.safetensors\.index\.fp16\.json"
    ):
        check_components(locate(str(pipeline)))


def test_no_variant_serves_all(copied: Callable[[str], Path]) -> None:
    pipeline = copied("tiny-sd3")
    renamed(pipeline, "transformer")
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").rename(
        pipeline / "vae" / "diffusion_pytorch_model.bf16.safetensors"
    )
    with pytest.raises(
        DiffcError, match=r"vae has weights of the variant 'bf16' only, and other components of 'fp16' only"
    ):
        check_components(locate(str(pipeline)))


def test_a_folder_that_is_not_there_is_named(copied: Callable[[str], Path]) -> None:
    pipeline = copied("tiny-flux")
    shutil.rmtree(pipeline / "tokenizer")
    source = locate(str(pipeline))  # a compile that needs no pipeline goes on
    with pytest.raises(DiffcError, match=r"names tokenizer, and .* has no such folder"):
        check_components(source)
    check_components(source, without=("tokenizer",))


def test_weights_that_are_not_there_are_named(copied: Callable[[str], Path]) -> None:
    pipeline = copied("tiny-flux")
    weights = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DiffcError, match=r"vae has a config\.json and no weights in safetensors"):
        check_components(locate(str(pipeline)))


def test_sd3_without_t5_opens(copied: Callable[[str], Path]) -> None:
    pipeline = copied("tiny-sd3")
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(pipeline / name)
    index = json.loads((pipeline / "model_index.json").read_text())
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (pipeline / "model_index.json").write_text(json.dumps(index | absent))
    source = locate(str(pipeline))
    check_components(source)
    pipe = open_pipeline(source, dtype=torch.float32, fix="x")
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_3 is None
