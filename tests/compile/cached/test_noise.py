"""Rounding noise of kept tensors beside their change: what is measured, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from modelopt.torch.quantization import calibrate
from torch import nn

from diffc.cache import ResolvedCache, resolve
from diffc.cache.plan import CachePlan, Entry
from diffc.compile.cached.noise import BlockNoise, CacheNoise, compare_noise, describe
from diffc.compile.plan import check
from diffc.compile.quantize import calibrated
from diffc.compile.request import CompileRequest
from diffc.compile.stages import measure, resolve_cache
from diffc.models.sources.backbone import FakeBackbone
from diffc.progress import Silent
from diffc.quantize.convert import insert_quantizers
from diffc.quantize.formats import find_format
from tests.backbones import backbone_of, inputs_of, make_portable


def quantized(format: str = "int8") -> nn.Module:
    backbone = backbone_of("sd3")
    insert_quantizers(backbone, find_format(format), "(pos_embed|time_text_embed|context_embedder|proj_out)")
    with torch.no_grad():
        calibrate(backbone, "max", forward_loop=lambda model: [model(**call) for call in moved(0.3)])
    make_portable(backbone)
    return backbone


def plan_of(backbone: nn.Module, keep: Any = "residual") -> ResolvedCache:
    return resolve(CachePlan((Entry(("transformer_blocks.0",), keep=keep),)), backbone)


def moved(by: float) -> list[dict[str, Any]]:
    """The inputs of two steps whose latents differ by `by`, relative to their norm."""
    first, other = inputs_of("sd3"), inputs_of("sd3", seed=5)["hidden_states"]
    latents = first["hidden_states"]
    other = other * latents.norm() / other.norm()
    return [first, {**first, "hidden_states": latents + by * other}]


def test_noise_of_the_same_step_twice_is_not_drawn_anew() -> None:
    backbone = quantized()
    (block,) = compare_noise(backbone, plan_of(backbone), moved(0.0))
    assert block.noise > 1e-3
    assert block.change < 1e-9 > block.redrawn


def test_noise_larger_than_the_change_fights_and_the_blocks_own_quantizers_are_to_blame() -> None:
    backbone = quantized()
    (block,) = compare_noise(backbone, plan_of(backbone), moved(1e-4))
    assert block.fights
    assert block.helped
    assert block.kept is not None
    assert block.kept < 1e-4 * block.redrawn  # nothing before the first block is quantized
    (far,) = compare_noise(backbone, plan_of(backbone), moved(0.5))
    assert not far.fights
    assert far.kept is None
    assert far.change > 100 * block.change


@pytest.mark.parametrize("keep", ["output", "residual"])
def test_change_and_noise_are_those_of_the_block(keep: str) -> None:
    backbone = quantized()
    calls = moved(0.3)
    (found,) = compare_noise(backbone, plan_of(backbone, keep), calls)
    rounded = [seen(backbone, call, keep) for call in calls]
    for name, module in backbone.named_modules():
        if name.endswith("input_quantizer"):
            module.disable()  # amax is of these very inputs: nothing saturates
    exact = [seen(backbone, call, keep) for call in calls]
    size = exact[1].norm()
    assert found.change == pytest.approx(float((exact[1] - exact[0]).norm() / size), rel=1e-3)
    assert found.noise == pytest.approx(float((rounded[1] - exact[1]).norm() / size), rel=1e-3)


def seen(backbone: nn.Module, call: dict[str, Any], keep: str) -> torch.Tensor:
    """Both streams of the first block in a row, with `keep` residual less what it was given."""
    found: list[torch.Tensor] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        pairs = zip(output, given, strict=True)
        found.append(torch.cat([(o - g if keep == "residual" else o).flatten() for o, g in pairs]))

    handle = backbone.get_submodule("transformer_blocks.0").register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        backbone(**call)
    handle.remove()
    return found[0]


def test_what_is_said_depends_on_what_helps() -> None:
    quiet = BlockNoise("a.0", 0.1, 0.05, 0.05)
    own = BlockNoise("a.1", 0.01, 0.05, 0.05, kept=0.002)
    inherited = BlockNoise("a.2", 0.01, 0.05, 0.05, kept=0.049)
    found = CacheNoise(10, 20, (quiet, own, inherited))
    lines = describe(found)
    assert len(lines) == 3
    assert "1.00% to 10.00%" in lines[0]
    assert "--keep 'a.1.*' it is 0.20%" in lines[1]
    assert "a.2" in lines[2]
    assert "--keep" not in lines[2]
    assert found.to_json()["keep"] == ["a.1.*"]
    assert len(describe(replace(found, blocks=(quiet,)))) == 1


class Notes:
    """Remembers what a compile says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def stage(self, title: str) -> Iterator[Any]:
        del title
        yield lambda done, total: None

    def note(self, text: str) -> None:
        self.said.append(text)


def test_the_pipeline_gives_two_neighbouring_steps(tmp_path: Path) -> None:
    request = CompileRequest(
        "digits-sd3", tmp_path / "out", "mxfp8", dtype="float32", cache_plan="blocks", steps=4,
        prompts=("a handwritten seven",),
    )  # fmt: skip
    plan = check(request)
    backbone, ui = FakeBackbone(plan.source, plan.dtype), Notes()
    cache, checkpoint = resolve_cache(plan, backbone, Silent()), calibrated(plan, backbone, Silent())
    found = measure(plan, cache, checkpoint, ui)
    assert found is not None
    assert (found.step, found.steps) == (2, 4)
    assert [block.block for block in found.blocks] == ["transformer_blocks.1"]
    assert 1e-3 < found.blocks[0].redrawn < found.blocks[0].change < 2
    assert any("kept tensors change by" in line for line in ui.said)
    skipped = check(replace(request, skip_validation=True))
    assert measure(skipped, cache, checkpoint, ui) is None
    assert "not measured" in ui.said[-1]
    assert measure(plan, None, None, ui) is None
