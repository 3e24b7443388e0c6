"""Gives a backbone a forward() of plain tensors, one for each graph input, for the time of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional

from diffc.models.family import Family
from diffc.models.inputs import forward_kwargs, tensors_of
from diffc.models.rewrites import rewrite_modules
from diffc.models.spec import Config


def flatten(backbone: torch.nn.Module, family: Family, config: Config) -> None:
    """Replace the forward() of `backbone`, in place: it takes the graph inputs by name, and gives a tuple of tensors.

    Lists, numbers and constants are put together inside (`forward_kwargs`), where torch.export sees none of them.
    """
    rewrite_modules(backbone)
    original, names = backbone.forward, [item.name for item in family.inputs(config)]
    results = len(family.outputs(config))

    def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = dict(zip(names, args, strict=False)) | kwargs
        found = original(**forward_kwargs(family, config, values, batched=True), return_dict=False)
        return tensors_of(found)[:results]

    forward.__signature__ = Signature(  # type: ignore[attr-defined]  # what torch.export names inputs after
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    backbone.forward = forward


@contextmanager
def masks_with_all_rows() -> Iterator[None]:
    """While open, attention gets its mask with one row for each query, as ONNX Runtime's CPU provider wants it.

    before: a mask [batch, 1, 1, keys]      after: the same mask, expanded to [batch, 1, queries, keys]
    """
    plain = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if attn_mask is not None and attn_mask.dim() > 1:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], attn_mask.shape[-1])
        return plain(query, key, value, attn_mask, *args, **kwargs)

    with patch.object(functional, "scaled_dot_product_attention", attention):
        yield
