"""Which layers of captured classes stay unquantized."""

from __future__ import annotations

import re

import pytest

from diffc.models.hints import HINTS, hints_of


def kept(backbone_class: str, path: str, **config: int) -> bool:
    return re.match(hints_of(backbone_class).kept(config), path) is not None


def test_ends_are_counted_for_every_depth() -> None:
    inside = "blocks.{}.attn1.to_q"
    for layers, expected in (
        (40, {0, 1, 2, 37, 38, 39}),
        (30, {0, 1, 2, 27, 28, 29}),
        (4, {0, 3}),
        (3, set()),
    ):
        found = {
            n for n in range(layers) if kept("WanTransformer3DModel", inside.format(n), num_layers=layers)
        }
        assert found == expected


@pytest.mark.parametrize("name", HINTS)
def test_what_leads_in_and_out_is_kept_and_blocks_are_not(name: str) -> None:
    for path in (
        "proj_out",
        "x_embedder",
        "time_embed.linear_1",
        "condition_embedder.time_embedder.linear_1",
    ):
        assert kept(name, path, num_layers=24)
    blocks = f"{HINTS[name].blocks}.12.attn.to_q"
    assert not kept(name, blocks, num_layers=24)


def test_a_class_that_nobody_named_has_a_name_and_defaults() -> None:
    assert hints_of("KreaTransformer2DModel").name == "krea"
    assert hints_of("SomethingElse").name == "somethingelse"
    assert kept("SomethingElse", "head.linear")
    assert not kept("SomethingElse", "layers.3.mlp.up")


def test_names_differ_from_those_of_families_with_a_file() -> None:
    from diffc.models.registry import FAMILIES

    assert not {h.name for h in HINTS.values()} & FAMILIES.keys()
