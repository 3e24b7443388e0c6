"""A forward() of plain tensors for a trace, and masks with a row for every query."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from diffc.frontend.flat import flatten, masks_with_all_rows
from diffc.models.captured import captured_family
from diffc.models.inputs import tensors_of
from diffc.models.interface import Dimension, Input, Interface, Output
from diffc.models.relation import relation


class Nested(nn.Module):
    def forward(self, hidden: Any, sizes: Any = None, count: int = 0, *, return_dict: bool = True) -> Any:
        assert not return_dict
        return [hidden * sizes["scale"][1] + count * sizes["scale"][0]]


def interface() -> Interface:
    from fractions import Fraction

    return Interface(
        backbone_class="Nested",
        component="transformer",
        pipeline_class="NestedPipeline",
        inputs=(
            Input("hidden", ("hidden",), "model", ("batch", 4)),
            Input("scale_1", ("sizes", "scale", 1), "model", (4,)),
            Input("count", ("count",), "float32", ("height",), "size"),
        ),
        constants=((("sizes", "scale", 0), 0.5),),
        tuples=(("sizes", "scale"),),
        dimensions=(
            Dimension("batch", relation({("batch",): Fraction(1)})),
            Dimension("height", relation({("height",): Fraction(1, 8)})),
        ),
        outputs=(Output("out_hidden", ("batch", 4)),),
        output_class="builtins:dict",
        attributes={},
        batch=1,
        multiple=8,
        frames=None,
        native={"batch": 1, "height": 64, "width": 64, "frames": 1, "text": 8},
    )


def test_inputs_by_name_reach_their_places() -> None:
    model, family = Nested(), captured_family(interface(), {})
    flatten(model, family, {})
    hidden, scale = torch.randn(2, 4), torch.randn(4)
    (found,) = model(hidden=hidden, scale_1=scale, count=torch.zeros(7))
    assert torch.equal(found, hidden * scale + 7 * 0.5)
    assert torch.equal(model(hidden, scale, torch.zeros(7))[0], found)


def test_masks_are_spread_over_queries() -> None:
    seen = list[Any]()
    plain = functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[3])
        return plain(*args, **kwargs)

    draw = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 5, 8, generator=draw), torch.randn(2, 1, 7, 8, generator=draw)
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])[:, None, None]
    expected = plain(q, k, k, attn_mask=mask)
    functional.scaled_dot_product_attention = spy
    try:
        with masks_with_all_rows():
            found = functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    finally:
        functional.scaled_dot_product_attention = plain
    assert seen[0].shape == (2, 1, 5, 7)
    assert torch.equal(found, expected)


def test_tensors_of_nested_results() -> None:
    a, b = torch.ones(1), torch.ones(2)
    assert tensors_of(([a], {"x": b}, None)) == (a, b)
