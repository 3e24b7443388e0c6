"""Copies in pieces, through buffers that are used again."""

from __future__ import annotations

import pytest
import torch

from diffc.quantize.staging import Staging


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (129, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_copy_in_pieces_has_all_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    staging = Staging(torch.device("cpu"), piece=1000)
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    turned = tensor.T if tensor.dim() == 2 else tensor
    for expected in (tensor, turned):
        copy = staging.copy(expected)
        assert torch.equal(copy, expected)
        assert copy.dtype == dtype
        assert not copy.numel() or copy.data_ptr() != expected.data_ptr()
    staging.close()
    assert staging.spent.bytes == 2 * tensor.nbytes
