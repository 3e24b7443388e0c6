"""The LoRAs that come with diffc: fused by recipes, they give the weights that PEFT's own merge gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffc.models.embedded.digits import build
from diffc.models.embedded.loras import EMBEDDED_LORAS
from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.locate import locate
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.sources.loras import with_loras
from passes.weights.evaluate import evaluate

WEIGHTS = (0.5, -1.25)


@pytest.fixture(scope="module")
def merged() -> dict[str, torch.Tensor]:
    """The weights of digits-sd3 with both LoRAs, merged by PEFT in float32."""
    model = build("digits-sd3").transformer.float()
    with quiet_libraries():
        for name, file in EMBEDDED_LORAS.items():
            model.load_lora_adapter(load_file(file), prefix="transformer", adapter_name=name)
        model.set_adapters(list(EMBEDDED_LORAS), list(WEIGHTS))
        model.fuse_lora()
    state = model.state_dict()
    return {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}


def test_both_are_merged_as_by_peft(merged: dict[str, torch.Tensor]) -> None:
    specs = [LoraSpec(name, weight) for name, weight in zip(EMBEDDED_LORAS, WEIGHTS, strict=True)]
    base = locate("digits-sd3")
    fused = with_loras(base, specs)
    changed = [name for name, recipe in fused.weights.items() if recipe != base.weights[name]]
    assert len(changed) > 20
    for name, recipe in fused.weights.items():
        got, wanted = evaluate(recipe).astype(np.float32), merged[name].numpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6, err_msg=name)
        if name in changed:
            assert np.abs(wanted - evaluate(base.weights[name]).astype(np.float32)).max() > 1e-4
