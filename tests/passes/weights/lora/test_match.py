"""passes/weights/lora/match.py, kinds.py, changes.py: each kind of adapter against the same sum in numpy's float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.lora.fuse import apply_files, fuse
from passes.weights.lora.match import Strength
from passes.weights.recipe import Array
from tests.passes.weights.lora.files import FLUX, arrays, factors, weights, written

SUM = 2e-6  # relative L2: float32 sums of products of rank up to 8, against float64
TO_Q = "transformer_blocks.0.attn.to_q"


def fused(
    folder: Path, tensors: dict[str, Array], strength: Strength | None = None, *, partial: bool = False,
    shapes: dict[str, tuple[int, ...]] | None = None, metadata: dict[str, str] | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """The weights without and with an adapter file of `tensors`, changed ones only, in float64."""
    shapes = dict(FLUX) if shapes is None else shapes
    values, recipes = weights(folder / "model.safetensors", shapes)
    file = written(folder / "adapter.safetensors", tensors, metadata)
    applied = apply_files([(file, strength or Strength())], shapes, partial=partial)
    result = fuse(recipes, applied)
    changed = [name for name in recipes if result[name] is not recipes[name]]
    after = {name: evaluate(result[name]).astype(np.float64) for name in changed}
    return {name: values[name].astype(np.float64) for name in changed}, after


def close(found: Array, wanted: Array) -> bool:
    return bool(np.linalg.norm(found - wanted) <= SUM * np.linalg.norm(wanted))


def test_alpha_over_rank_times_weight(tmp_path: Path) -> None:
    lora = factors("lora_unet_transformer_blocks_0_attn_to_q", 8, 8)
    up, down = (array.astype(np.float64) for array in lora.values())
    before, after = fused(
        tmp_path, {**lora, "lora_unet_transformer_blocks_0_attn_to_q.alpha": np.float32(2.0)}, Strength(0.7)
    )
    assert list(after) == [f"{TO_Q}.weight"]
    assert close(after[f"{TO_Q}.weight"], before[f"{TO_Q}.weight"] + 0.7 * 2 / 3 * up @ down)


def test_joined_rows_go_to_their_layers(tmp_path: Path) -> None:
    lora = factors("lora_unet_single_blocks_1_linear1", 56, 8)
    up, down = (array.astype(np.float64) for array in lora.values())
    before, after = fused(tmp_path, lora)
    block = "single_transformer_blocks.1"
    names = [f"{block}.{name}.weight" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert sorted(after) == sorted(names)
    total = np.concatenate([after[name] - before[name] for name in names])
    assert close(total, up @ down) or np.allclose(total, up @ down, atol=1e-6)


def test_halves_of_the_last_modulation_are_swapped(tmp_path: Path) -> None:
    lora = factors("lora_unet_final_layer_adaLN_modulation_1", 16, 8)
    up, down = (array.astype(np.float64) for array in lora.values())
    before, after = fused(tmp_path, lora)
    delta = up @ down
    swapped = np.concatenate([delta[8:], delta[:8]])
    assert close(after["norm_out.linear.weight"], before["norm_out.linear.weight"] + swapped)


def _loha(t: dict[str, Array]) -> Array:
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * (3 / 2)


def _lokr(t: dict[str, Array]) -> Array:
    return np.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]) * (3 / 2)


def _lokr_whole(t: dict[str, Array]) -> Array:
    return np.kron(t["lokr_w1"], t["lokr_w2"])  # nothing is decomposed: alpha counts for nothing


DENSE: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[dict[str, Array]], Array]]] = {
    "loha": ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}, _loha),
    "lokr": ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}, _lokr),
    "lokr_whole": ({"lokr_w1": (2, 2), "lokr_w2": (4, 4)}, _lokr_whole),
    "diff": ({"diff": (8, 8)}, lambda t: t["diff"]),
}


@pytest.mark.parametrize("kind", DENSE)
def test_dense_kinds(kind: str, tmp_path: Path) -> None:
    shapes, delta = DENSE[kind]
    made = arrays(shapes, 5)
    tensors = {f"lycoris_transformer_blocks_0_attn_to_q.{name}": array for name, array in made.items()}
    if kind != "diff":
        tensors["lycoris_transformer_blocks_0_attn_to_q.alpha"] = np.float32(3.0)
    before, after = fused(tmp_path, tensors, Strength(-0.5))
    wide = {name: array.astype(np.float64) for name, array in made.items()}
    assert close(after[f"{TO_Q}.weight"], before[f"{TO_Q}.weight"] - 0.5 * delta(wide))


CONV = {"down_blocks.0.resnets.0.conv1.weight": (8, 4, 3, 3), "down_blocks.0.resnets.0.conv1.bias": (8,)}
LAYER = "lora_unet_down_blocks_0_resnets_0_conv1"


def test_convolution_and_its_tucker_form(tmp_path: Path) -> None:
    name = next(iter(CONV))
    lora = arrays({"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (2, 4, 3, 3)}, 2)
    before, after = fused(tmp_path, {f"{LAYER}.{k}": v for k, v in lora.items()}, shapes=dict(CONV))
    up, down = (array.astype(np.float64) for array in lora.values())
    assert close(after[name], before[name] + np.einsum("or,rikl->oikl", up[..., 0, 0], down))
    core = arrays(
        {"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (3, 4, 1, 1), "lora_mid.weight": (2, 3, 3, 3)}, 3
    )
    before, after = fused(tmp_path, {f"{LAYER}.{k}": v for k, v in core.items()}, shapes=dict(CONV))
    up, down, mid = (array.astype(np.float64) for array in core.values())
    assert close(
        after[name], before[name] + np.einsum("pqkl,op,qi->oikl", mid, up[..., 0, 0], down[..., 0, 0])
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_dora_gives_rows_or_columns_new_norms(axis: int, weight: float, tmp_path: Path) -> None:
    name, layer = (
        "transformer_blocks.0.ff.net.0.proj.weight",
        "transformer.transformer_blocks.0.ff.net.0.proj",
    )
    lora = factors(layer, 32, 8)
    up, down = (array.astype(np.float64) for array in lora.values())
    magnitude = np.abs(arrays({"m": (32, 1) if axis == 0 else (1, 8)}, 4)["m"])
    before, after = fused(tmp_path, {**lora, f"{layer}.dora_scale": magnitude}, Strength(weight))
    changed = before[name] + up @ down
    new = changed * magnitude / np.linalg.norm(changed, axis=1 - axis, keepdims=True)
    assert close(after[name], before[name] + weight * (new - before[name]))


def test_whole_tensors_and_biases(tmp_path: Path) -> None:
    made = arrays({"w": (8, 8), "b": (8,), "lora_B.bias": (8,)}, 6)
    block = "transformer_blocks.0.attn"
    lora = factors(f"{block}.to_k", 8, 8)
    before, after = fused(
        tmp_path,
        {f"{block}.to_q.weight": made["w"], f"{block}.to_v.diff_b": made["b"], **lora,
         f"{block}.to_k.lora_B.bias": made["lora_B.bias"], f"{block}.to_k.alpha": np.float32(6.0)},
        Strength(0.5),
    )  # fmt: skip
    assert close(after[f"{block}.to_q.weight"], made["w"].astype(np.float64))
    assert close(after[f"{block}.to_v.bias"], before[f"{block}.to_v.bias"] + 0.5 * made["b"])
    assert close(
        after[f"{block}.to_k.bias"], before[f"{block}.to_k.bias"] + 0.5 * 6 / 3 * made["lora_B.bias"]
    )


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 3), (True, 8 / 3**0.5)])
def test_settings_of_peft(rslora: bool, scale: float, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    lora = factors(layer, 8, 8)
    up, down = (array.astype(np.float64) for array in lora.values())
    settings = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 8}, "use_rslora": rslora}
    text = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    before, after = fused(tmp_path, lora, metadata={"lora_adapter_metadata": text})
    name = f"{TO_Q}.weight"
    assert close(after[name], before[name] + scale * up @ down)


def test_weights_of_blocks(tmp_path: Path) -> None:
    lora = factors("transformer_blocks.0.attn.to_q", 8, 8) | factors("double_blocks.1.img_attn.proj", 8, 8)
    strength = Strength(1.0, (("transformer_blocks.0.*", 0.0), ("double_blocks.1.*", 0.25)))
    before, after = fused(tmp_path, lora, strength)
    assert list(after) == ["transformer_blocks.1.attn.to_out.0.weight"]  # weight 0 changes nothing
    delta = lora["double_blocks.1.img_attn.proj.lora_up.weight"].astype(np.float64)
    delta = 0.25 * delta @ lora["double_blocks.1.img_attn.proj.lora_down.weight"]
    (name,) = after
    assert close(after[name], before[name] + delta)
    with pytest.raises(PassError, match=r"pattern 'mid\*' matches no layer"):
        fused(tmp_path, lora, Strength(1.0, (("mid*", 0.5),)))


def test_two_adapters_in_either_order_give_the_same_bits(tmp_path: Path) -> None:
    values, recipes = weights(tmp_path / "model.safetensors", FLUX)
    files = [
        (
            written(tmp_path / f"{seed}.safetensors", factors(TO_Q, 8, 8, rank=seed, seed=seed)),
            Strength(0.1 * seed),
        )
        for seed in (2, 5)
    ]
    name = f"{TO_Q}.weight"
    first, second = (fuse(recipes, apply_files(order, FLUX))[name].cast(10) for order in (files, files[::-1]))
    assert np.array_equal(evaluate(first).view(np.uint16), evaluate(second).view(np.uint16))
    assert not np.array_equal(evaluate(first), values[name])


def test_what_does_not_fit_is_listed_key_by_key(tmp_path: Path) -> None:
    block = "transformer_blocks.0.attn"
    tensors = {
        **factors(f"{block}.to_q", 8, 8),
        **factors(f"{block}.to_k", 16, 8),
        **factors("transformer_blocks.99.attn.to_q", 8, 8),
        f"{block}.to_v.lora_down.weight": np.ones((2, 8), np.float32),
        f"{block}.to_v.oft_blocks": np.ones((2, 8), np.float32),
        "lora_te1_text_model_encoder.alpha": np.float32(1),
    }
    with pytest.raises(PassError, match="6 of 9 keys") as caught:
        fused(tmp_path, tensors)
    for text in ("16 x 8", "no such layer", r"lora_B (lora_up) is missing", "an OFT", "--lora-partial"):
        assert text in str(caught.value)
    assert "lora_te1" not in str(caught.value)
    _, after = fused(tmp_path, tensors, partial=True)
    assert list(after) == [f"{block}.to_q.weight"]


def test_a_file_for_another_model_says_for_which(tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    with pytest.raises(PassError, match=r"made for another model \(Stable Diffusion 1\.x\)"):
        fused(tmp_path, factors(layer, 320, 768))
    with pytest.raises(PassError, match="only has keys of text encoders"):
        fused(tmp_path, factors("lora_te1_text_model_a", 8, 8))


def test_dora_of_convolutions(tmp_path: Path) -> None:
    """PEFT has a norm for each row, [1, rows, 1, 1]; LyCORIS for each column, [1, columns, 1, 1]."""
    name = next(iter(CONV))
    lora = arrays({"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (2, 4, 3, 3)}, 2)
    up, down = (array.astype(np.float64) for array in lora.values())
    for key, axis in (("lora_magnitude_vector", 0), ("dora_scale", 1)):
        norms = np.abs(arrays({"m": (1, (8, 4)[axis], 1, 1)}, 3)["m"]) + 0.5
        before, after = fused(
            tmp_path,
            {**{f"{LAYER}.{k}": v for k, v in lora.items()}, f"{LAYER}.{key}": norms},
            shapes=dict(CONV),
        )
        changed = before[name] + np.einsum("or,rikl->oikl", up[..., 0, 0], down)
        others = tuple(i for i in range(4) if i != axis)
        along = norms.reshape([-1 if i == axis else 1 for i in range(4)])
        assert close(after[name], changed * along / np.sqrt((changed**2).sum(axis=others, keepdims=True)))


def test_a_whole_model_is_no_lora(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="a model, not a LoRA"):
        fused(tmp_path, arrays(FLUX))


def test_the_same_layer_twice_counts_once_and_is_told(tmp_path: Path) -> None:
    twice = factors("transformer_blocks.0.attn.to_q", 8, 8) | factors("double_blocks.0.img_attn.qkv", 24, 8)
    with pytest.raises(PassError, match=r"changes .* already"):
        fused(tmp_path, twice)
