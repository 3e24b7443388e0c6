"""Files that no model can take: each is refused before any work, and the message says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from passes.base import PassError
from passes.weights.lora.fuse import Applied, apply_files
from passes.weights.lora.match import Strength
from passes.weights.recipe import Array
from tests.passes.weights.lora.files import FLUX, factors, written

GOOD = "lora_unet_transformer_blocks_0_attn_to_q"
UP, DOWN, ALPHA = f"{GOOD}.lora_up.weight", f"{GOOD}.lora_down.weight", f"{GOOD}.alpha"
Tensors = dict[str, Array]


def applied(path: Path, tensors: Tensors) -> list[Applied]:
    return apply_files([(written(path / "a.safetensors", tensors), Strength())], FLUX)


def with_one(key: str, change: Callable[[Array], Array]) -> Tensors:
    made = factors(GOOD, 8, 8) | {ALPHA: np.array(3, np.float32)}
    return made | {key: change(made[key])}


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        (ALPHA, lambda _: np.ones(3, np.float32), "alpha is 1, 1, 1, and one number"),
        (UP, lambda x: x[:, :2], "their ranks are 3 and 2"),
        (DOWN, lambda x: x.reshape(-1), "are not matrices"),
        (UP, lambda x: x.astype(np.int8), "type INT8"),
        (DOWN, lambda x: x > 0, "type BOOL"),
    ],
)
def test_a_damaged_layer_is_not_called_one_of_another_model(
    tmp_path: Path, key: str, change: Callable[[Array], Array], said: str
) -> None:
    with pytest.raises(PassError, match=said) as told:
        applied(tmp_path, with_one(key, change))
    assert "nothing of a.safetensors can be applied" in str(told.value)
    assert "Fix: download it again" in str(told.value)


def test_a_rank_of_zero(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="its rank is 0"):
        applied(tmp_path, factors(GOOD, 8, 8, rank=0))


def test_parts_of_a_product_that_do_not_meet(tmp_path: Path) -> None:
    pairs = {"hada_w1_a": (8, 2), "hada_w1_b": (3, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{GOOD}.{name}": np.ones(shape, np.float32) for name, shape in pairs.items()}
    with pytest.raises(PassError, match=r"shapes \[8, 2\] and \[3, 8\] have no product"):
        applied(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_one_value_that_is_not_finite(tmp_path: Path, dtype: type, value: float) -> None:
    def spoil(x: Array) -> Array:
        x = x.astype(dtype)
        x[2, 1] = value
        return x

    with pytest.raises(PassError, match=rf"{UP}' of \S*a.safetensors holds (NaN|infinity).*Fix: download"):
        applied(tmp_path, with_one(UP, spoil))


def test_an_alpha_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=rf"{ALPHA}' of \S*a.safetensors holds infinity"):
        applied(tmp_path, with_one(ALPHA, lambda _: np.array(np.inf, np.float32)))


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", factors(GOOD, 8, 8))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PassError, match=r"cut off: tensor .*Fix: download it again"):
        apply_files([(path, Strength())], FLUX)


def test_text_with_the_name_of_a_lora(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("<html>404</html>", encoding="utf-8")
    with pytest.raises(PassError, match=r"is not a safetensors file.*Fix: download it again"):
        apply_files([(path, Strength())], FLUX)


def test_a_layer_of_a_unet_is_told_from_one_of_a_transformer(tmp_path: Path) -> None:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(PassError, match=r"another model \(a UNet, such as SDXL\)"):
        applied(tmp_path, factors(name, 8, 8))
