"""passes/weights/lora/spellings.py: the names under which a file may know a layer."""

from __future__ import annotations

import pytest

from passes.weights.lora.spellings import Piece, spellings_of
from tests.passes.weights.lora.files import FLUX


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks_1_attn_to_q",
        "transformer_blocks.1.attn.processor.to_q_lora",
    ],
)
def test_spellings_of_one_layer(name: str) -> None:
    assert spellings_of(FLUX).find(name) == (Piece("transformer_blocks.1.attn.to_q"),)


@pytest.mark.parametrize("name", ["single_blocks.0.linear1", "single_blocks_0_linear1"])
def test_joined_rows(name: str) -> None:
    block = "single_transformer_blocks.0"
    assert spellings_of(FLUX).find(name) == (
        Piece(f"{block}.attn.to_q", 0, 8),
        Piece(f"{block}.attn.to_k", 8, 8),
        Piece(f"{block}.attn.to_v", 16, 8),
        Piece(f"{block}.proj_mlp", 24, 32),
    )


def test_the_last_modulation_is_swapped() -> None:
    assert spellings_of(FLUX).find("final_layer.adaLN_modulation.1") == (
        Piece("norm_out.linear", swapped=True),
    )


def test_of_sd3_only_the_last_context_modulation_is_swapped() -> None:
    shapes = {
        f"transformer_blocks.{n}.norm1_context.linear.weight": (rows, 8) for n, rows in ((0, 48), (1, 16))
    }
    found = [spellings_of(shapes).find(f"joint_blocks_{n}_context_block_adaLN_modulation_1") for n in (0, 1)]
    assert [layer[0].swapped for layer in found if layer] == [False, True]


def test_a_layer_that_the_model_lacks_has_no_name() -> None:
    assert spellings_of(FLUX).find("double_blocks.2.img_attn.qkv") is None
    assert spellings_of(FLUX).find("double_blocks.0.txt_mlp.0") is None


def test_a_flat_name_that_means_two_layers_means_none() -> None:
    both = spellings_of({"a.b_c.weight": (1, 1), "a_b.c.weight": (1, 1)})
    assert both.find("a_b_c") in ((Piece("a.b_c"),), (Piece("a_b.c"),), None)
    assert both.find("a.b_c") == (Piece("a.b_c"),)


def test_wan_numbers_its_norms_another_way() -> None:
    shapes = {f"blocks.0.{name}.weight": (4, 4) for name in ("norm2", "norm3", "attn1.to_q")}
    found = spellings_of(shapes)
    assert found.find("blocks.0.norm3") == (Piece("blocks.0.norm3"),)
    assert found.find("blocks.0.norm3", overrides=True) == (Piece("blocks.0.norm2"),)
    assert found.find("blocks_0_self_attn_q") == (Piece("blocks.0.attn1.to_q"),)
