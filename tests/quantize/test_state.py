"""The state of one quantizer: scales that every compute type holds exactly."""

from __future__ import annotations

import pytest
import torch

from diffc.quantize.state import SMALLEST_SCALE, portable


def assert_next_portable(amax: torch.Tensor, observed: torch.Tensor) -> None:
    """A step of bfloat16 above what was seen, at most (1e-6: float32 rounding of the hook's own run)."""
    assert (amax >= observed * (1 - 1e-6)).all()
    assert (amax <= observed * (1 + 2**-7 + 1e-6)).all()


@pytest.mark.parametrize("bound", [127.0, 448.0, 6.0])
def test_portable_scales_are_exact_in_every_float_type(bound: float) -> None:
    generator = torch.Generator().manual_seed(8)
    seen = torch.exp2(torch.rand(50_000, generator=generator) * 30 - 8)  # 2^-8 .. 2^22
    seen = seen[seen / bound < 6e4]  # float16 ends at 65504
    amax = portable(seen, bound)
    scale = amax / bound
    for dtype in (torch.float16, torch.bfloat16):
        # The division above rounds once; the exact scale is the nearest value that both types hold.
        torch.testing.assert_close(scale.to(dtype).float(), scale, rtol=2e-7, atol=0)
    assert_next_portable(amax, torch.maximum(seen, torch.tensor(SMALLEST_SCALE * bound)))
    assert torch.equal(portable(amax, bound), amax)
    assert torch.equal(amax.sort().values, portable(seen.sort().values, bound))  # larger seen, larger amax


def test_portable_scale_has_a_floor() -> None:
    tiny = torch.tensor([1e-30, 1e-9, 2.0**-17 * 127])
    assert torch.equal(portable(tiny, 127.0), torch.full((3,), 2.0**-17 * 127))
    assert torch.tensor(SMALLEST_SCALE).to(torch.float16).float() == SMALLEST_SCALE
