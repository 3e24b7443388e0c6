"""Cache plans: how they are read, and what a torch backbone does with them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffc import cache
from diffc.cache import CachePlan, Entry, Steps, resolve
from diffc.cache.generations import time_and_conditions
from diffc.cache.plan import steps_from_json, steps_to_json
from diffc.cache.resolve import ResolvedCache, matches, spell
from diffc.errors import DiffcError
from tests.backbones import backbone_of, inputs_of

BLOCK = {"sd3": "transformer_blocks.0", "flux": "single_transformer_blocks.0", "sdxl": "up_blocks.1"}


@pytest.mark.parametrize(
    ("steps", "count", "chosen"),
    [
        (Steps(every=2), None, [1, 3, 5, 7]),
        (Steps(every=3, start=2, stop=6), None, [3, 4]),
        (Steps(start=5), None, [5, 6, 7]),
        (Steps(), None, [1, 2, 3, 4, 5, 6, 7]),
        (Steps(listed=(0, 2, -1)), 8, [2, 7]),
        (Steps(start=0.5, stop=-1), 8, [4, 5, 6]),
        (Steps.of(lambda step, count: step > count // 2, [8, 4]), 8, [5, 6, 7]),
    ],
)
def test_steps(steps: Steps, count: int | None, chosen: list[int]) -> None:
    assert [s for s in range(8) if steps.reuses(s, count)] == chosen
    assert steps_from_json(steps_to_json(steps)) == steps
    assert steps.needs_count == (count is not None)


def test_steps_that_need_a_count_say_so() -> None:
    with pytest.raises(DiffcError, match="depends on the number of denoising steps"):
        Steps(stop=-1).reuses(1, None)
    with pytest.raises(DiffcError, match=r"unknown number of steps in a cache plan '9'. Known: 8"):
        Steps.of(lambda step, count: True, [8]).reuses(1, 9)
    with pytest.raises(DiffcError, match="every is 1"):
        Steps(every=1)


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("transformer_blocks.*", "transformer_blocks.3", True),
        ("transformer_blocks.*", "transformer_blocks.3.attn", False),
        ("transformer_blocks.2-11", "transformer_blocks.11", True),
        ("transformer_blocks.2-11", "transformer_blocks.12", False),
        ("**.attn2", "down_blocks.0.attentions.1.attn2", True),
        ("**.attn2", "down_blocks.0.attentions.1.attn2.to_q", False),
        ("up_blocks.[01]", "up_blocks.1", True),
    ],
)
def test_patterns(pattern: str, path: str, fits: bool) -> None:
    assert matches(pattern, path) == fits


def test_a_plan_survives_its_files(tmp_path: Path) -> None:
    import json

    import yaml

    plan = CachePlan((Entry(("a.*", "b"), Steps(start=0.4), "output", ("a.3",)), Entry(("c",))), "mine")
    for name, dump in (("plan.json", json.dumps), ("plan.yaml", yaml.safe_dump)):
        (tmp_path / name).write_text(dump(plan.to_json()))
        assert CachePlan.load(tmp_path / name) == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"entries": [{"block": ["a"]}]}', "unknown key of an entry of a cache plan 'block'. Known: blocks"),
        ('{"entries": [{"blocks": ["a"], "steps": {"each": 2}}]}', "unknown key of the steps"),
        ('{"entries": [{"blocks": ["a"], "keep": "half"}]}', "unknown keep in a cache plan 'half'"),
        ('{"entries": [{"blocks": ["a"], "steps": ["one"]}]}', "are not steps"),
        ('{"entries": [{"blocks": 3}]}', "are module paths, not 3"),
        ("[1]", "a cache plan is a mapping"),
        ("{", "cannot read the cache plan"),
    ],
)
def test_files_that_are_no_plan(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(DiffcError, match=says):
        CachePlan.load(tmp_path / "plan.json")


def test_later_entries_override_and_overlaps_are_told() -> None:
    backbone = backbone_of("sd3", num_layers=4)
    plan = CachePlan((Entry(("transformer_blocks.*",)), Entry(("transformer_blocks.1-2",), Steps(every=3))))
    found = resolve(plan, backbone)
    assert [g.blocks for g in found.groups] == [
        ("transformer_blocks.0", "transformer_blocks.3"),
        ("transformer_blocks.1", "transformer_blocks.2"),
    ]
    assert found.notes == ("entry 2 decides for transformer_blocks.1-2, which earlier entries name as well",)
    assert [sorted(s) for s in found.schedule(7)] == [[], [0, 1], [1], [0], [1], [0, 1], []]
    assert found.reuse_sets() == [{0, 1}, {0}, {1}]
    assert ResolvedCache.from_json(found.to_json()).groups == found.groups


def test_a_predicate_becomes_a_list() -> None:
    found = resolve(CachePlan((Entry(lambda path: path.endswith("1")),)), backbone_of("sd3", num_layers=3))
    assert found.to_json()["groups"][0]["blocks"] == ["transformer_blocks.1"]


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ((Entry(("transformer_block.0",)),), r"no module matches .*\n.*\(transformer_blocks.0-1\)"),
        ((Entry(("transformer_blocks.0", "**.ff")),), "transformer_blocks.0.ff, which is inside it"),
        (
            (Entry(("transformer_blocks.0.ff",), keep="residual"),),
            "is a FeedForward, whose output is not its input plus something",
        ),
        ((Entry(lambda path: False),), "takes no block"),
    ],
)
def test_plans_that_do_not_fit(entries: tuple[Entry, ...], says: str) -> None:
    with pytest.raises(DiffcError, match=says):
        resolve(CachePlan(entries), backbone_of("sd3"))


def test_block_lists_are_short() -> None:
    assert spell(["a.0", "a.1", "a.3", "mid_block", "b.0"]) == "a.0-1, a.3, mid_block, b.0"


@pytest.mark.parametrize(
    ("name", "family", "blocks"),
    [
        ("deepcache", "sdxl", ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"]),
        ("deepcache:levels=2", "sdxl", ["down_blocks.2", "mid_block", "up_blocks.0"]),
        ("modelopt-sdxl", "sdxl", [*(f"down_blocks.{i}" for i in range(3)), "mid_block", "up_blocks.0", "up_blocks.1"]),
        ("modelopt-sd3", "sd3", ["transformer_blocks.0", "transformer_blocks.1"]),
        ("blocks:first=1,last=1", "flux", ["single_transformer_blocks.0"]),
    ],
)  # fmt: skip
def test_presets(name: str, family: str, blocks: list[str]) -> None:
    backbone = backbone_of(family)
    (group,) = resolve(cache.preset(name, backbone), backbone).groups
    assert set(group.blocks) == set(blocks)


def test_tgate_keeps_every_cross_attention() -> None:
    backbone = backbone_of("sdxl")
    (group,) = resolve(cache.preset("tgate:step=4", backbone), backbone).groups
    assert len(group.blocks) == sum(path.endswith(".attn2") for path, _ in backbone.named_modules())
    assert [s for s in range(8) if group.steps.reuses(s, None)] == [4, 5, 6, 7]
    with pytest.raises(DiffcError, match="no cross attention"):
        cache.preset("tgate", backbone_of("sd3"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("deep", "unknown cache plan 'deep'. Known: deepcache"),
        ("deepcache:each=2", "unknown argument of cache plan deepcache 'each'. Known: every, levels"),
        ("deepcache:every=two", "has no number"),
        ("deepcache:levels=9", "levels=9"),
        ("blocks:first=9", "none is between"),
    ],
)
def test_presets_that_are_none(text: str, says: str) -> None:
    with pytest.raises(DiffcError, match=says):
        cache.preset(text, backbone_of("sdxl"))


class Loop:
    """Calls a backbone as a denoising loop does: time goes down, the prompt stays, the latents change."""

    def __init__(self, family: str, prompt: int = 0):
        self.family, self.given = family, inputs_of(family, prompt)
        self.latents = "sample" if family == "sdxl" else "hidden_states"

    def at(self, time: float, seed: int) -> dict[str, Any]:
        latents = inputs_of(self.family, seed)[self.latents]
        timestep = torch.full_like(self.given["timestep"], time)
        return self.given | {self.latents: latents, "timestep": timestep}


def call(backbone: nn.Module, values: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return backbone(**values, return_dict=False)[0]


@pytest.mark.parametrize("family", BLOCK)
def test_a_reused_block_does_not_run_and_its_value_is_used(family: str) -> None:
    backbone, loop = backbone_of(family), Loop(family)
    block, runs = backbone.get_submodule(BLOCK[family]), []
    next(block.children()).register_forward_hook(lambda *_: runs.append(1))
    plan = CachePlan((Entry((BLOCK[family],), Steps(every=2)),))
    plain = [call(backbone, loop.at(900 - 100 * i, 5 + i)) for i in range(4)]
    once = runs[: len(runs) // 2]  # a plain run of the four took twice as many
    runs.clear()
    with cache.apply(backbone, plan):
        out = [call(backbone, loop.at(900 - 100 * i, 5 + i)) for i in range(4)]
        assert len(runs) == len(once)
    assert torch.equal(out[0], plain[0])
    assert torch.equal(out[2], plain[2])
    assert not torch.allclose(out[1], plain[1], rtol=1e-3)
    assert torch.equal(call(backbone, loop.at(800, 6)), plain[1])  # it is off again


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_residual_is_added_to_the_fresh_input(family: str) -> None:
    backbone, loop = backbone_of(family), Loop(family)
    block, seen = backbone.get_submodule(BLOCK[family]), {}

    def watch(*call: Any) -> None:
        seen["in"], seen["out"] = call[2:]

    handle = block.register_forward_hook(watch, with_kwargs=True)
    with cache.apply(backbone, CachePlan((Entry((BLOCK[family],), Steps(every=2)),))) as applied:
        assert applied.plan.groups[0].keep == "residual"
        call(backbone, loop.at(900, 1))
        first = {k: seen["in"][k] for k in ("encoder_hidden_states", "hidden_states")}, seen["out"]
        call(backbone, loop.at(800, 2))
    handle.remove()
    for i, name in enumerate(("encoder_hidden_states", "hidden_states")):
        expected = seen["in"][name] + (first[1][i] - first[0][name])
        torch.testing.assert_close(seen["out"][i], expected)


@pytest.mark.parametrize("change", ["time", "prompt", "written", "shape", "reset"])
def test_a_new_generation_never_sees_an_old_value(change: str) -> None:
    backbone, loop = backbone_of("sd3"), Loop("sd3")
    plan = CachePlan((Entry(("transformer_blocks.*",), Steps()),))  # every step but the first
    with cache.apply(backbone, plan) as applied:
        call(backbone, loop.at(500, 1))
        second = loop.at(400, 2)
        if change == "time":
            second = loop.at(500, 2)
        elif change == "prompt":
            second |= {"pooled_projections": second["pooled_projections"] * 1.5}
        elif change == "written":
            second["encoder_hidden_states"].mul_(2)
        elif change == "shape":
            second = {k: v[:1] for k, v in second.items()}
        else:
            applied.generations.reset()
        out = call(backbone, second)
    assert torch.equal(out, call(backbone, second))


def test_equal_prompts_in_other_tensors_go_on() -> None:
    backbone, loop = backbone_of("sd3"), Loop("sd3")
    with cache.apply(backbone, CachePlan((Entry(("transformer_blocks.*",), Steps()),))):
        call(backbone, loop.at(500, 1))
        second = {k: v.clone() for k, v in loop.at(400, 2).items()}
        assert not torch.equal(call(backbone, second), call(backbone, loop.at(400, 2)))


def test_branches_of_guidance_are_kept_apart() -> None:
    backbone, cond, uncond = backbone_of("flux"), Loop("flux", 1), Loop("flux", 2)
    plan = CachePlan((Entry(("transformer_blocks.*",), Steps()),))
    with cache.apply(backbone, plan):
        alone = [call(backbone, cond.at(t, 3)) for t in (0.9, 0.8)]
    with cache.apply(backbone, plan):
        mixed = []
        for t in (0.9, 0.8):
            with backbone.cache_context("cond", step_index=1, sigma=t):  # as WAN's pipeline says it
                mixed.append(call(backbone, cond.at(t, 3)))
            with backbone.cache_context("uncond"):
                call(backbone, uncond.at(t, 3))
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


def test_threads_are_kept_apart() -> None:
    backbone = backbone_of("sd3")
    loops = [Loop("sd3", seed) for seed in (1, 2)]
    plan = CachePlan((Entry(("transformer_blocks.*",), Steps(every=2)),))
    times = [900.0, 700.0, 500.0, 300.0]

    def generate(loop: Loop, out: list[torch.Tensor], turn: Any) -> None:
        for i, time in enumerate(times):
            turn()
            out.append(call(backbone, loop.at(time, 10 + i)))

    with cache.apply(backbone, plan):
        alone: list[list[torch.Tensor]] = [[], []]
        for loop, out in zip(loops, alone, strict=True):
            generate(loop, out, lambda: None)
        together: list[list[torch.Tensor]] = [[], []]
        barrier = threading.Barrier(2)
        threads = [
            threading.Thread(target=generate, args=(loop, out, barrier.wait))
            for loop, out in zip(loops, together, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_second_plan_and_no_backbone_are_refused() -> None:
    backbone = backbone_of("sd3")
    with (
        cache.apply(backbone, "blocks:first=0,last=0"),
        pytest.raises(DiffcError, match="a cache plan already"),
    ):
        cache.apply(backbone, "blocks:first=0,last=0")
    with pytest.raises(DiffcError, match="has no backbone"):
        cache.apply(object(), "blocks")


def test_pipelines_that_look_at_parameters_find_them() -> None:
    """FluxPipeline refuses a scheduler whose set_timesteps takes no sigmas."""
    import inspect

    from diffusers import FlowMatchEulerDiscreteScheduler

    class Pipe:
        transformer, scheduler = backbone_of("flux"), FlowMatchEulerDiscreteScheduler()

    names = list(inspect.signature(Pipe.transformer.forward).parameters)
    with cache.apply(Pipe, "blocks:first=0,last=0") as applied:
        assert "sigmas" in inspect.signature(Pipe.scheduler.set_timesteps).parameters
        assert list(inspect.signature(Pipe.transformer.forward).parameters) == names
        Pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
        assert applied.generations.count == 3


def test_a_pipeline_tells_the_number_of_steps_and_each_call_is_new() -> None:
    from diffusers import DiffusionPipeline

    from diffc.models.embedded.catalogue import materialize

    pipe = DiffusionPipeline.from_pretrained(materialize("digits-sd3"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def paint(prompt: str, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        out = pipe(
            prompt, num_inference_steps=steps, generator=generator, output_type="latent", height=64, width=64
        )
        return out.images

    with cache.apply(pipe, CachePlan((Entry(("transformer_blocks.0-1",), Steps(start=0.5)),))) as applied:
        first = paint("a handwritten seven", 4)
        assert applied.generations.count == 4
        other = paint("a handwritten two", 6)
        assert applied.generations.count == 6
        assert torch.equal(paint("a handwritten seven", 4), first)
    assert not torch.equal(first, other)
    assert not torch.equal(paint("a handwritten seven", 4), first)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_mode_computes_the_same(mode: Any) -> None:
    backbone, plan = backbone_of("sd3"), CachePlan((Entry(("transformer_blocks.*",), Steps(every=2)),))
    loop, times = Loop("sd3", 1), (500, 400, 300)
    with cache.apply(backbone, plan):
        expected = [call(backbone, loop.at(time, 2)) for time in times]
    with mode(), cache.apply(backbone, plan) as applied:
        made = Loop("sd3", 1)
        found = [call(backbone, made.at(time, 2)) for time in times]
        made.at(200, 2)["encoder_hidden_states"].mul_(2)  # written to in place: another prompt
        call(backbone, made.at(200, 2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert str(applied.report()) == "1 of 4 steps used kept values"


def test_branches_called_in_turn_are_each_a_generation() -> None:
    """Loops of their own call the prompt and then none, without telling which it is."""
    backbone, plan = backbone_of("sd3"), CachePlan((Entry(("transformer_blocks.*",), Steps(every=2)),))
    with cache.apply(backbone, plan) as applied:
        for time in (900, 800, 700, 600):
            for seed in (1, 2):
                call(backbone, Loop("sd3", seed).at(time, seed))
    assert (applied.report().steps, applied.report().reused) == (8, 4)


def test_what_a_control_adds_is_no_condition() -> None:
    given = {"sample": torch.ones(1), "timestep": torch.tensor(3.0), "encoder_hidden_states": torch.ones(2)}
    controls = {
        "down_block_additional_residuals": (torch.ones(3), torch.ones(4)),
        "mid_block_additional_residual": torch.ones(5),
        "block_controlnet_hidden_states": [torch.ones(6)],
    }
    time, tensors, conditions = time_and_conditions(given | controls)
    assert (float(time), list(conditions)) == (3.0, ["encoder_hidden_states"])
    assert [len(tensor) for tensor in tensors] == [1, 2, 3, 4, 5, 6]
    nested = {
        "timestep": 1.0,
        "added_cond_kwargs": {"text_embeds": torch.ones(2)},
        "image_embeds": [torch.ones(1)],
    }
    assert list(time_and_conditions(nested)[2]) == ["text_embeds", "image_embeds.0"]


def test_a_plan_that_is_not_followed_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    backbone, plan = backbone_of("sd3"), CachePlan((Entry(("transformer_blocks.*",), Steps(every=2)),))
    with cache.apply(backbone, plan) as applied:
        for step in range(6):
            call(backbone, Loop("sd3", 20 + step).at(900 - 100 * step, 1))  # another prompt in every step
    told = (
        "the cache plan is not followed: from step to step encoder_hidden_states, pooled_projections changed,"
    )
    assert capsys.readouterr().err == f"{told} so each step is computed in full\n"
    assert applied.report().reused == 0
