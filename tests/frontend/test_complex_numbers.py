"""Complex rotary tables as pairs give what torch gives with complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffc.frontend.complex_numbers import complex_as_pairs


class Rotary(nn.Module):
    """Tables as Qwen-Image keeps them: complex, one a plain attribute and one a buffer, cut and joined again."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.5, 0.1, 0.01]))
        self.table = torch.polar(torch.ones_like(angles), angles)
        self.tables = [self.table.conj().resolve_conj()]
        self.register_buffer("kept", self.table * 2, persistent=False)

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        first, second = self.table.split([1, 3], dim=1)
        size = x.shape[1]
        a = first[:rows].view(rows, 1, -1).expand(rows, size // rows, -1)
        b = second[-(size // rows) :].view(1, size // rows, -1).expand(rows, size // rows, -1)
        freqs = torch.cat([a, b], dim=-1).reshape(size, -1).clone().contiguous()
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * freqs.unsqueeze(0)
        turned = turned * self.kept[:size, ...].to(x.device) * self.tables[0][:size]
        return torch.view_as_real(turned).flatten(2)


@pytest.mark.parametrize(("size", "rows"), [(6, 2), (12, 3)])
def test_pairs_compute_what_complex_numbers_do(size: int, rows: int) -> None:
    x = torch.randn(2, size, 8, generator=torch.Generator().manual_seed(size))
    expected = Rotary()(x, rows)
    changed = Rotary()
    with complex_as_pairs(changed):
        found = changed(x, rows)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    exported = Rotary()
    with complex_as_pairs(exported):
        program = torch.export.export(exported, (x, rows))
    assert not any("complex" in str(node.target) for node in program.graph.nodes)


def test_what_rotary_embeddings_do_not_use_is_told() -> None:
    module = Rotary()
    with complex_as_pairs(module), pytest.raises(NotImplementedError, match="angle of complex numbers"):
        torch.angle(module.table)
