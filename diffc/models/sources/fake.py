"""Parameters without values, under a FakeTensorMode."""

from __future__ import annotations

from typing import Any


def fake_parameters(model: Any, mode: Any) -> None:
    """Give parameters that are on the meta device a place on the CPU, in `mode` and without values."""
    import torch

    with mode:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module.register_parameter(name, torch.nn.Parameter(fake, False))
