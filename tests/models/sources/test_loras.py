"""diffc/models/sources/loras.py and torch_loras.py: files of many trainers in the embedded models' weights.

Each file (tests/data/README.md) has the output of the backbone with the LoRA in it, made by torch from the sum in
float64 (and not by this code): within a few times what rounding the weights to 16 bits once changes. `unmatched` keys
must be told.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffc.errors import DiffcError
from diffc.models.inputs import forward_kwargs
from diffc.models.registry import find_family
from diffc.models.sources.backbone import DTYPES, build_backbone
from diffc.models.sources.locate import ModelSource, locate
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.sources.loras import described_loras, with_loras, with_recorded_loras
from diffc.models.sources.torch_loras import fused_tensors
from diffc.tensors import tensor_of
from tests import DATA
from tests.passes.weights.lora.files import FLUX, arrays, factors, weights, written

FOLDER = DATA / "lora"
CASES: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
TIMES = 0.5  # of the rounding of all changed weights: a lost layer changes several times that
SAME_ROUNDING = 1e-3  # the share of values that float32 and float64 sums may round to different neighbours


def fused(case: str) -> ModelSource:
    specs = [LoraSpec(str(FOLDER / file), weight) for file, weight in CASES[case]["files"]]
    return with_loras(locate(CASES[case]["model"]), specs, partial=case == "sd3-unmatched")


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_exact_sum(case: str) -> None:
    source = fused(case)
    assert source.base is not None
    changed = [name for name, recipe in source.weights.items() if recipe is not source.base.weights[name]]
    assert len(changed) == CASES[case]["changed_weights"]
    dtype = DTYPES[source.dtype]
    state = {name: tensor_of(recipe, dtype) for name, recipe in source.weights.items()}
    differing = total = 0
    for name, tensor in fused_tensors(source, dtype).items():
        differing += int((tensor != state[name]).sum())
        total += tensor.numel()
    assert differing <= SAME_ROUNDING * total
    model = build_backbone(source.family, source.config, torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    stored = np.load(FOLDER / f"{case}.npz")
    values = {key[3:]: torch.from_numpy(stored[key]) for key in stored.files if key.startswith("in_")}
    with torch.no_grad():
        output = model(**forward_kwargs(source.family, source.config, values), return_dict=False)[0].numpy()
    distance = np.linalg.norm(output - stored["fused16"]) / np.linalg.norm(stored["fused16"])
    assert distance <= TIMES * CASES[case]["rel_rounding"]


def test_a_manifest_finds_the_files_again_and_sees_a_change(tmp_path: Any) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((FOLDER / "sd3-peft.safetensors").read_bytes())
    base, specs = locate("tiny-sd3"), (LoraSpec(str(file), 0.5, (("*.attn.to_q", 0.1),)),)
    source = with_loras(base, specs)
    described = described_loras(source, specs)
    assert described[0]["parameters"] == CASES["sd3-peft"]["changed_weights"]
    manifest = {"model": {"loras": json.loads(json.dumps(described))}, "request": {"lora_partial": False}}
    assert with_recorded_loras(base, manifest).fingerprint == source.fingerprint
    assert source.fingerprint not in (
        base.fingerprint,
        with_loras(base, [replace(specs[0], weight=0.6)]).fingerprint,
    )
    assert (source.dtype, source.nbytes) == (base.dtype, base.nbytes)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DiffcError, match="SHA-256 differs"):
        with_recorded_loras(base, manifest)


def test_unmatched_keys_stop_the_compile() -> None:
    specs = [LoraSpec(str(FOLDER / "sd3-unmatched.safetensors"))]
    with pytest.raises(DiffcError) as caught:
        with_loras(locate("tiny-sd3"), specs)
    for text in ("blocks.99", "blocks.0.attn.to_k", "blocks.1.attn.to_k", "5 of 17"):
        assert text in str(caught.value)


def test_recipes_and_torch_agree_on_every_kind(tmp_path: Path) -> None:
    """float32 recipes against float64 in torch, both rounded to float16: all but a few ties are the same bits."""
    block = "transformer_blocks.0.attn"
    values = arrays(
        {"m": (8, 1), "n": (1, 8), "w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8), "d": (8,)},
        5,
    )
    tensors = {
        **factors(f"{block}.to_q", 8, 8),
        f"{block}.to_q.dora_scale": np.abs(values["m"]),
        **factors(f"{block}.to_k", 8, 8, seed=2),
        f"{block}.to_k.dora_scale": np.abs(values["n"]),
        **{f"{block}.to_v.hada_{name}": values[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        f"{block}.to_v.diff_b": values["d"],
        **factors("single_blocks.1.linear1", 56, 8, seed=3),
        **factors("final_layer.adaLN_modulation.1", 16, 8, seed=4),
    }
    written(tmp_path / "lora.safetensors", tensors)
    _, recipes = weights(tmp_path / "model.safetensors", FLUX)
    base = ModelSource("small", tmp_path, None, {}, find_family("flux"), recipes)
    source = with_loras(base, [LoraSpec(str(tmp_path / "lora.safetensors"), 0.6)] * 2)
    wanted = fused_tensors(source, torch.float16)
    assert len(wanted) == 9
    found = {name: tensor_of(source.weights[name], torch.float16) for name in wanted}
    differing = sum(int((found[name] != wanted[name]).sum()) for name in wanted)
    assert differing <= SAME_ROUNDING * sum(tensor.numel() for tensor in wanted.values())
    assert (source.dtype, source.nbytes) == (base.dtype, base.nbytes)
    assert source.fingerprint != base.fingerprint
