"""Names of weight files: which are taken, of which variant."""

from __future__ import annotations

import random

import pytest

from diffc.models.sources.weight_names import choose, common_variant, of_variant, weight_files

PLAIN, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


@pytest.mark.parametrize(
    ("name", "variant", "spelling"),
    [
        (PLAIN, None, ""),
        (FP16, "fp16", ""),
        (PLAIN + ".index.json", None, "now"),
        (PLAIN + ".index.fp16.json", "fp16", "now"),
        (PLAIN + ".fp16.index.json", "fp16", "old"),
        (FP16 + ".index.json", "fp16", "odd"),
        ("model.bf16.safetensors", "bf16", ""),
    ],
)
def test_every_spelling(name: str, variant: str | None, spelling: str) -> None:
    names = [name, "config.json", "x-00001-of-00002.safetensors", "openvino.safetensors", "model.onnx"]
    (file,) = weight_files(names)
    assert (file.name, file.variant, file.spelling) == (name, variant, spelling)


def test_what_is_taken_does_not_depend_on_the_order_of_names() -> None:
    names = [PLAIN, FP16, PLAIN + ".index.fp16.json", "model.safetensors", "config.json"]
    for seed in range(5):
        random.Random(seed).shuffle(names)
        taken = {variant: choose(names, variant) for variant in (None, "fp16", "ema")}
        found = {variant: file.name for variant, file in taken.items() if file}
        assert found == {None: PLAIN, "fp16": PLAIN + ".index.fp16.json", "ema": PLAIN}
    assert choose(["config.json"], None) is None


def test_a_variant_that_serves_every_folder() -> None:
    assert common_variant([[PLAIN, FP16], ["model.safetensors"], ["vocab.json"]]) is None
    assert common_variant([[PLAIN, FP16], ["model.fp16.safetensors"]]) == "fp16"
    assert common_variant([[PLAIN], ["model.fp16.safetensors", "model.ema.safetensors"]]) == "fp16"
    assert common_variant([[FP16], ["model.bf16.safetensors"]]) in ("fp16", "bf16")


def test_shards_belong_to_the_index_of_their_variant() -> None:
    names = [
        *("diffusion_pytorch_model-00001-of-00001.safetensors", PLAIN + ".index.json"),
        *(
            "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
            PLAIN + ".index.fp16.json",
            "config.json",
        ),
    ]
    for variant, expected in ((None, names[:2]), ("fp16", names[2:4])):
        chosen = choose(names, variant)
        assert chosen is not None
        assert set(of_variant(names, chosen)) == set(expected)
