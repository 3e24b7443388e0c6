"""The sides of a measurement: the compiled backbone, torch eager and torch.compile, each loaded in its own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffc.artifact.folder import Artifact
from diffc.models.sources.backbone import DTYPES, load_backbone
from diffc.models.sources.locate import locate
from diffc.models.sources.loras import with_recorded_loras
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.runtime.load import load

SIDES = ("eager", "compile")
"""What a compiled backbone can be measured beside."""
Backbone = Callable[..., Any]


@dataclass(frozen=True)
class Setup:
    """What every side is given: the artifact, the torch model's place, the compute type, the device, the target.

    `cuda_graph`: the compiled side's launches are recorded and replayed. `hub`: which files of the model are read.
    """

    artifact: Path
    model: str
    dtype: str
    device: str
    target: str | None
    cuda_graph: bool = False
    hub: HubOptions = DEFAULT_HUB


def load_side(name: str, setup: Setup) -> Backbone:
    """A backbone, called as diffusers calls one. `name` is "compiled" or one of SIDES."""
    if name == "compiled":
        backbone: Backbone = load(
            setup.artifact, target=setup.target, device=setup.device, cuda_graph=setup.cuda_graph
        )
        return backbone
    source = with_recorded_loras(locate(setup.model, setup.hub), Artifact.load(setup.artifact).manifest)
    model = load_backbone(source, DTYPES[setup.dtype]).to(setup.device)
    if name == "eager":
        return model
    # Shapes are fixed: what is measured is the kernel that torch makes for this shape.
    compiled: Backbone = torch.compile(model, dynamic=False)
    return compiled
