"""Compiling with a cache plan: what is written, that compiled cached steps are torch's, and that images are."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import DiffusionPipeline

import diffc
from diffc import cache
from diffc.cache.plan import Steps
from diffc.cache.resolve import Group, ResolvedCache
from diffc.cli.main import run
from diffc.compile.cached.chain import _size, cut_chain
from diffc.compile.spine import compile_model
from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import find_family
from diffc.models.sizes import size_of
from diffc.models.sources.locate import locate
from diffc.models.spec import Shape
from diffc.runtime.cached import CachedSession
from tests.cli_helpers import Capture, refusal
from tests.conftest import Cells
from tests.networks import FP32, make, value

PLANS = {"digits-sd3": "blocks:first=0", "digits-flux": "blocks:first=0", "digits-sdxl": "deepcache:every=2"}
COMPONENT = {"digits-sd3": "transformer", "digits-flux": "transformer", "digits-sdxl": "unet"}
SMALL: dict[str, Any] = {"targets": ("ort",), "sms": (), "dtype": "float32"}
CHEAP = [("digits-sd3", "none")]
REST = [
    *(("digits-sdxl", "none"), ("digits-flux", "none")),
    *(("digits-sd3", "fp8"), ("digits-flux", "fp8"), ("digits-sdxl", "fp8")),
]
FULL, CHAIN = "full+reduced", "segments"
EVERY = [
    *((*case, layout) for case in CHEAP for layout in (FULL, CHAIN)),
    *(pytest.param(*case, layout, marks=pytest.mark.slow) for case in REST for layout in (FULL, CHAIN)),
]


def cell(compiled: Cells, model: str, format: str = "none", layout: str = FULL) -> Any:
    return compiled(model, format, cache_plan=PLANS[model], cache_layout=layout, **SMALL)


def pipeline(model: str) -> Any:
    pipe = DiffusionPipeline.from_pretrained(materialize(model), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, prompt: str, *, seed: int = 1, width: int = 64, steps: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = {"height": 64, "width": width}
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="pt", **size).images


@pytest.mark.parametrize(("model", "format", "layout"), EVERY)
def test_cached_steps_are_those_of_torch(compiled: Cells, model: str, format: str, layout: str) -> None:
    done = cell(compiled, model, format, layout)
    assert ("noise" in done.artifact.manifest["cache"]) == (format != "none")
    reports = [r for r in done.result.validation if "reuse" in r.model]
    assert {r.arithmetic for r in reports} >= {"float32"}
    assert len({str(r.shape) for r in reports}) == 2
    for report in reports:
        assert report.passed or report.chaotic
        assert all(row.tolerance <= 2e-3 for row in report.rows)


@pytest.mark.parametrize(("model", "format"), CHEAP)
def test_two_models_over_the_same_weights(compiled: Cells, model: str, format: str) -> None:
    done = cell(compiled, model, format)
    written = {p.name for p in done.folder.iterdir() if p.suffix in (".onnx", ".onnx_data")}
    assert written == {"model.onnx", "model-keep.onnx", "model-reuse-1.onnx", "model.onnx_data"}
    entry = done.artifact.manifest["cache"]
    assert [m["files"] for m in entry["models"]] == [
        {"ort": "model-keep.onnx"},
        {"ort": "model-reuse-1.onnx"},
    ]
    plain = compiled(model, format, skip_validation=True, **SMALL)
    for name in ("model.onnx", "model.onnx_data"):
        assert (done.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    reduced = onnx.load(done.folder / "model-reuse-1.onnx", load_external_data=False)
    assert len(reduced.graph.node) < 0.75 * len(done.model.graph.node)


@pytest.mark.parametrize(("model", "format", "layout"), EVERY[:3])
def test_images_are_those_of_the_torch_cached_run(
    compiled: Cells, model: str, format: str, layout: str
) -> None:
    pipe, prompt = pipeline(model), "a handwritten seven"
    plain = paint(pipe, prompt)
    with cache.apply(pipe, PLANS[model]):
        expected = paint(pipe, prompt)
    backbone = diffc.load(cell(compiled, model, format, layout).folder)
    setattr(pipe, COMPONENT[model], backbone)
    torch.testing.assert_close(paint(pipe, prompt), expected, atol=2e-4, rtol=0)
    assert (expected - plain).abs().max() > 2e-3
    full = diffc.load(cell(compiled, model, format, layout).folder, cache=False)
    setattr(pipe, COMPONENT[model], full)
    torch.testing.assert_close(paint(pipe, prompt), plain, atol=2e-4, rtol=0)


@pytest.mark.parametrize("layout", [FULL, CHAIN])
def test_generations_of_threads_with_other_prompts_and_shapes_are_as_alone(
    compiled: Cells, layout: str
) -> None:
    backbone = diffc.load(cell(compiled, "digits-sd3", layout=layout).folder)
    asked = [("a handwritten seven", 64), ("a handwritten two", 96)]
    pipes = [pipeline("digits-sd3") for _ in asked]
    for pipe in pipes:
        pipe.transformer = backbone
    alone = [paint(p, prompt, width=w) for p, (prompt, w) in zip(pipes, asked, strict=True)]
    found: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2, timeout=60)

    def work(number: int) -> None:
        prompt, width = asked[number]
        generator = torch.Generator().manual_seed(1)

        def wait(*call: Any) -> Any:
            barrier.wait()  # step by step in turns
            return call[-1]

        found[number] = pipes[number](
            prompt, num_inference_steps=4, generator=generator, output_type="pt", height=64, width=width,
            callback_on_step_end=wait,
        ).images  # fmt: skip

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert torch.equal(found[number], expected)


def test_segments_share_no_weight_and_run_as_one(compiled: Cells) -> None:
    done = cell(compiled, "digits-sd3", layout=CHAIN)
    entry = done.artifact.manifest["cache"]
    assert [m["group"] for m in entry["models"]] == [None, 0, None]
    assert [(k["group"], k["source"] is None) for k in entry["kept"]] == [(0, False)] * 2
    parts = [onnx.load(done.folder / m["files"]["ort"], load_external_data=False) for m in entry["models"]]
    stored = [w.name for part in parts for w in part.graph.initializer if w.external_data]
    assert len(stored) == len(set(stored)) > 50
    assert {w.name for w in done.model.graph.initializer} >= set(stored)
    plain = compiled("digits-sd3", "none", skip_validation=True, **SMALL)
    for name in ("model.onnx", "model.onnx_data"):
        assert (done.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    # Not to the bit: in the one graph ONNX Runtime fuses across the borders.
    found = [diffc.load(done.folder, cache=follow) for follow in (True, False)]
    spec, config = find_family("sd3"), found[0].config
    values = random_inputs(spec, config, Shape(2, 64, 96, 21), dtype=torch.float32, seed=4)
    ours, whole = (backbone(**forward_kwargs(spec, config, values))[0] for backbone in found)
    assert (ours - whole).norm() < 1e-6 * whole.norm()


def test_plans_without_rows_of_blocks_are_no_chain() -> None:
    weight = onnx.numpy_helper.from_array(torch.eye(4).numpy(), "w")
    nodes = [
        onnx.helper.make_node("MatMul", [f"h{n}", "w"], [f"h{n + 1}"], f"blocks.{n}/MatMul")
        for n in range(12)
    ]
    ends = [value("h0", FP32, ["batch", 4])], [value("h12", FP32, ["batch", 4])]
    model = make(nodes, *ends, [weight])
    rows = ResolvedCache("odd", (Group(tuple(f"blocks.{n}" for n in range(1, 12, 2)), Steps(), "output"),))
    with pytest.raises(DiffcError, match="cuts the backbone into 12 segments, and 9 are the most"):
        cut_chain(model, rows, locate("digits-sd3"))


def test_sizes_of_what_crosses() -> None:
    sizes = [{"height": 4, "width": 6, "text": 20}, {"height": 8, "width": 10, "text": 36}]
    assert _size("x", [7, 7], sizes) == 7
    assert _size("x", [6, 20], sizes) == "height*width/4"
    assert _size("x", [26, 56], sizes) == "text+height*width/4"
    assert [size_of("text+height*width/4", s) for s in sizes] == [26, 56]
    with pytest.raises(DiffcError, match="a size of x is not a product"):
        _size("x", [5, 23], sizes)


def test_a_new_prompt_or_step_count_sees_nothing_of_the_last(compiled: Cells) -> None:
    pipe = pipeline("digits-sd3")
    pipe.transformer = diffc.load(cell(compiled, "digits-sd3").folder)
    first = paint(pipe, "a handwritten seven", steps=3)
    paint(pipe, "a handwritten two", steps=4)
    assert torch.equal(paint(pipe, "a handwritten seven", steps=3), first)


def test_a_plan_that_uses_nothing_again_adds_no_model(compiled: Cells, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"entries": []}))
    base = compiled("digits-sd3", "none", skip_validation=True, **SMALL)
    request = replace(base.request, output=tmp_path / "out", cache_plan=str(plan))
    compile_model(request)
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "out" / name).read_bytes() == (base.folder / name).read_bytes()
    assert diffc.load(tmp_path / "out").target == "ort"


@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        (["--cache-plan", "nothing"], "unknown cache plan 'nothing'", 2),
        (["--cache-plan", "tgate"], "no cross attention", 1),
        (["--cache-layout", "chain"], "unknown cache layout 'chain'. Known: full+reduced, segments", 2),
        (["--cache-plan", "missing.json"], "cannot read the cache plan: no such file: missing.json", 1),
    ],
)
def test_refusals_come_before_any_work(
    options: list[str], says: str, code: int, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["compile", "digits-sd3", "-o", str(tmp_path / "out"), *options]
    assert says in refusal(arguments, tmp_path, capsys, code)


def test_cache_commands_say_what_plans_mean(capsys: Capture) -> None:
    assert run(["cache", "list"]) == 0
    assert "deepcache:every=3,levels=1" in capsys.readouterr().out
    assert run(["cache", "show", "digits-sd3", "blocks", "--steps", "5"]) == 0
    text = capsys.readouterr().out
    assert "#.#.#  the residual of transformer_blocks.1" in text
    assert "2 models" in text


def test_sizes_as_text() -> None:
    sizes = {"height": 8, "width": 12, "text": 5}
    assert [size_of(t, sizes) for t in ("height*width/4", "text", 7, "text*3")] == [24, 5, 7, 15]


def test_an_unknown_count_is_asked_for(compiled: Cells) -> None:
    backbone = diffc.load(cell(compiled, "digits-sd3").folder)
    session = backbone._session
    assert isinstance(session, CachedSession)
    session.plan = ResolvedCache(
        "late", (Group(session.plan.groups[0].blocks, Steps(start=0.5), "residual"),)
    )
    pipe = pipeline("digits-sd3")
    pipe.transformer = backbone
    with pytest.raises(DiffcError, match="depends on the number of denoising steps"):
        paint(pipe, "a handwritten seven")
    backbone.start(4)
    paint(pipe, "a handwritten seven")
