"""The torch backbone that compiled graphs are held against."""

from __future__ import annotations

from pathlib import Path

import torch

from diffc.models.sources.backbone import load_backbone
from diffc.models.sources.locate import locate
from tools.prove.family_models import make


def test_what_a_class_keeps_in_float32_is_not_rounded(tmp_path: Path) -> None:
    source = locate(str(make("wan14b", tmp_path, num_layers=1)))
    whole, half = (load_backbone(source, dtype).state_dict() for dtype in (torch.float32, torch.float16))
    kept, other = "condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"
    assert half[kept].dtype == torch.float32
    assert torch.equal(half[kept], whole[kept])
    assert not torch.equal(whole[kept].half().float(), whole[kept])
    assert torch.equal(half[other], whole[other].half())
