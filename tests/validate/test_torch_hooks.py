"""The reference for attention with quantized probabilities is torch's attention up to their rounding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffc.validate.torch_hooks import _attention, counted_calls

MODULE = SimpleNamespace(
    **{name: torch.nn.Identity() for name in ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")},
    bmm2_output_quantizer=torch.nn.Identity(),
)


def drawn(heads: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, heads, 24, 16, generator=generator)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_it_is_attention_in_steps_of_e4m3(key_heads: int, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(11)
    query, key, value = (drawn(heads, generator) for heads in (4, key_heads, key_heads))
    mask = torch.randn(24, 24, generator=generator)
    # As diffusers calls it: everything by name.
    arguments = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False, "scale": scale}
    grouped = key_heads != 4
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, **arguments, enable_gqa=grouped
    )
    found = _attention(MODULE, query, key, value, **arguments, enable_gqa=grouped, softmax_scale=1.0 / 448)
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 2**-4  # half a step of E4M3 is 2^-4 of the value; no error would mean no rounding


def test_the_factor_of_scores_is_one_that_16_bits_hold() -> None:
    generator = torch.Generator().manual_seed(9)
    x = 3 * drawn(2, generator)
    module = SimpleNamespace(**{**vars(MODULE), "q_bmm_quantizer": torch.nn.Identity()})
    module.q_bmm_quantizer.amax = torch.tensor(448 * 0.0390625)
    factor, stored = 32**-0.5, float(torch.tensor(32**-0.5 * 0.0390625).half()) / 0.0390625
    found = _attention(module, x, x, x, scale=factor, softmax_scale=None, dtype=torch.float16)
    wanted, plain = (
        torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=s) for s in (stored, factor)
    )
    assert float((found - wanted).norm()) < 1e-6 * float(wanted.norm()) < float((plain - wanted).norm())


@pytest.mark.parametrize("causal", [True, False])
def test_masks_by_position_are_those_of_torch(causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = drawn(2, generator)
    mask = None if causal else torch.rand(2, 1, 24, 24, generator=generator) < 0.7
    wanted = torch.nn.functional.scaled_dot_product_attention(x, x, x, mask, is_causal=causal)
    found = _attention(MODULE, x, x, x, mask, is_causal=causal, softmax_scale=1.0 / 448)
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 2**-4


def test_modules_that_ran_are_counted_once() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 2))
    )
    seen: list[tuple[int, int]] = []
    with counted_calls(model, lambda done, total: seen.append((done, total))):
        for _ in range(2):
            model(torch.randn(3, 4, generator=torch.Generator().manual_seed(2)))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, *[5] * 5]
    assert {total for _, total in seen} == {5}
    model(torch.ones(1, 4))
    assert len(seen) == 10, "the hooks are gone"
