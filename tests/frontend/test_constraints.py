"""What torch.export suggests for dynamic sizes is taken over, until it agrees or a size turns into a constant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffc.errors import UnsupportedError
from diffc.frontend.constraints import Symbols, export_under_constraints, suggested_fixes
from diffc.models.spec import DimSpec

MESSAGE = """Constraints violated (height)! For more information, run with TORCH_LOGS="+dynamic".
Suggested fixes:
  _height = Dim('_height', min=2, max=64)
  height = 2*_height
  width = 4*_height - 1
"""


class Even(nn.Module):
    """Folds rows in pairs, as a patch embedding does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        return x.reshape(rows // 2, 2, x.shape[1]).sum(1)


class Fixed(nn.Module):
    """Makes a constant of its rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(x.shape[0])


def export(module: nn.Module, x: torch.Tensor) -> Any:
    def attempt(symbols: Symbols, defer: bool) -> Any:
        shapes = {"x": {0: symbols["rows"]}}
        return torch.export.export(
            module, (x,), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=defer
        )

    return export_under_constraints(attempt, [DimSpec("rows")])


def test_suggestions_are_read_and_applied() -> None:
    fixes = suggested_fixes(MESSAGE)
    assert fixes == {
        "_height": "Dim('_height', min=2, max=64)",
        "height": "2*_height",
        "width": "4*_height - 1",
    }
    symbols = Symbols([DimSpec("height"), DimSpec("width"), DimSpec("text", 3, 30)], fixes)
    assert str(symbols["height"]).replace(" ", "").endswith("2*_height")
    assert symbols["text"].__name__ == "3*_text"
    assert symbols["height"] is symbols["height"]
    assert suggested_fixes("no hint here") == {}


def test_a_size_that_must_be_even_becomes_even() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    program = export(Even(), x)
    other = torch.randn(10, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(program.module()(other), Even()(other))


def test_a_size_that_turns_into_a_constant_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"one rows alone \(6\)"):
        export(Fixed(), torch.ones(6, 3))
