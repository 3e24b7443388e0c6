"""A model of the hub as people have it, from its id to pictures: fp16 files, in shards, in a cache without network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffc.artifact.folder import Artifact
from diffc.cli.main import run
from diffc.models.embedded.catalogue import materialize

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.slow
@pytest.mark.compiles
def test_an_id_in_shards_of_fp16_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache" / "models--acme--tiny-sdxl"
    pipe = DiffusionPipeline.from_pretrained(materialize("tiny-sdxl"), dtype=torch.float16)
    snapshot = repository / "snapshots" / COMMIT
    pipe.save_pretrained(snapshot, variant="fp16", max_shard_size="500KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    assert len(list(snapshot.glob("unet/*-of-*"))) > 2, "the UNet is in shards"
    assert not [file for file in snapshot.rglob("*.safetensors") if "fp16" not in file.name]

    hub = ["--cache-dir", "cache"]
    short = ["--steps", "1", "--calib-size", "1", "--batch-size", "1", "--image-size", "64"]
    assert run(["compile", "acme/tiny-sdxl", *hub, "--format", "int8", *short, "-o", "art"]) == 0
    model = Artifact.load(Path("art")).manifest["model"]
    assert (model["name"], model["revision"]) == ("acme/tiny-sdxl", COMMIT)
    elsewhere = tmp_path / "elsewhere"
    shutil.move("art", elsewhere)
    for command in (
        ["validate", str(elsewhere), "--target", "ort"],
        ["generate", str(elsewhere), "--prompt", "a fox", "--steps", "1", "-o", "fox.png"],
        ["package", str(elsewhere), "-o", "packed"],
    ):
        assert run(command) == 0, command
    with Image.open("fox.png") as picture:
        assert picture.size[0] == picture.size[1]
    assert {"unet", "vae_decoder", "text_encoder", "text_encoder_2"} <= {
        p.name for p in Path("packed").iterdir()
    }
