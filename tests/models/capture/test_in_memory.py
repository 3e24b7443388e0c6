"""Interfaces of pipelines in memory: those of the folders that they were loaded from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LTXPipeline

from diffc.errors import UnsupportedError
from diffc.models.sources.live import live_source
from diffc.models.sources.locate import locate
from passes.weights.sources import memory_of_its_own
from tools.prove.family_models import make


class OwnPipeline(LTXPipeline):  # a class of the user's, which diffusers does not know
    pass


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make("ltx", tmp_path_factory.mktemp("models"), num_layers=1)
    return DiffusionPipeline.from_pretrained(folder)


def test_an_object_has_the_interface_of_its_folder(pipe: Any) -> None:
    expected = locate(pipe.config["_name_or_path"])
    before = dict(pipe.components)
    for same in (pipe, OwnPipeline(**pipe.components)):
        with memory_of_its_own():
            found = live_source(same)
        assert found.family.interface == expected.family.interface
        assert found.config == expected.config
    assert pipe.components == before


def test_a_compiled_backbone_of_another_name_is_found(pipe: Any) -> None:
    parts = {"vae": None, "prior": torch.compile(pipe.transformer)}
    cascade = SimpleNamespace(components=parts, config={})
    with pytest.raises(UnsupportedError, match="has no pipeline SimpleNamespace"), memory_of_its_own():
        live_source(cascade)


def test_a_backbone_alone_needs_its_pipeline(pipe: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"LTXVideoTransformer3DModel[\s\S]*give the pipeline"):
        live_source(pipe.transformer)
