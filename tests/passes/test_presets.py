"""The lists of passes: what each target runs, in which order, and what the model changes of it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from passes.base import Pass, all_passes
from passes.presets import CANONICAL, IMPORT, IMPORT_FILE, TARGETS, TargetOptions, target_passes

ROOT = Path(__file__).parents[2]
LISTS = {"canonical": CANONICAL, "import": IMPORT, "import file": IMPORT_FILE, **TARGETS}


def names(steps: tuple[Pass, ...]) -> list[str]:
    return [step.name for step in steps]


@pytest.mark.parametrize("name", LISTS)
def test_every_step_is_a_pass_by_its_name(name: str) -> None:
    known = all_passes()
    assert all(known[step.name] is type(step) for step in LISTS[name])


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("canonical", "fold-constants", "split-sequences"),
        ("canonical", "fold-weight-qdq", "fold-weight-layout"),
        ("import", "fold-int4-weights", "normalize-qdq"),
        ("import", "normalize-qdq", "fold-weight-qdq"),
        ("import", "match-types", "rewrite-opset"),
        ("trt-rtx", "fuse-qdq", "add-zero-bias"),
        ("ort", "emulate-fp4", "add-trt-functions"),
        ("ort-cuda", "fuse-rms-norm", "flatten-attention"),
        ("ort-cuda", "fold-value-bias", "fuse-skip-norm"),
        ("ort-cuda", "fuse-skip-norm", "fuse-residual"),
        ("ort-cuda", "fuse-bias-gelu", "lift-bias"),
        ("ort-cuda", "merge-modulations", "merge-row-products"),
    ],
)
def test_the_order_that_the_reasons_ask_for(name: str, first: str, then: str) -> None:
    order = names(LISTS[name])
    assert order.index(first) < order.index(then)


@pytest.mark.parametrize("name", [name for name in LISTS if "fp4" not in name])
def test_what_types_tensorrts_operators_comes_last(name: str) -> None:
    """What is typed must not change any more; a Concat that guard-slices adds has the type of its input."""
    order = [step for step in names(LISTS[name]) if step != "guard-slices"]
    if "type-trt-ops" in order:
        assert order[-1] == "type-trt-ops"


@pytest.mark.parametrize("target", TARGETS)
def test_fp8_attention_is_written_first_where_tensorrt_computes_it(target: str) -> None:
    plain, quantized = (
        names(target_passes(target, TargetOptions(quantized_attention=q))) for q in (False, True)
    )
    assert plain == names(TARGETS[target])
    assert quantized == (["quantize-softmax"] if "trt" in target or target == "tensorrt" else []) + plain


def test_ort_cuda_is_told_the_tokens_and_joins_blocks_only_where_it_may() -> None:
    steps = target_passes("ort-cuda", TargetOptions(tokens=4096, across_blocks=False))
    told = [step for step in steps if "tokens" in {field.name for field in fields(step)}]
    assert {step.name for step in told} == {"fold-gates", "fuse-skip-norm"}
    assert all(getattr(step, "tokens") == 4096 for step in told)  # noqa: B009  (Pass has no such field)
    assert "merge-modulations" not in names(steps)
    assert "merge-modulations" in names(target_passes("ort-cuda"))


def test_every_line_has_its_reason() -> None:
    text = (ROOT / "passes" / "presets.py").read_text(encoding="utf-8").splitlines()
    steps = [
        line for line in text if line.startswith("    ") and line.rstrip().split("  #")[0].endswith("),")
    ]
    steps = [line for line in steps if line.strip()[0].isupper()]
    assert len(steps) > 40
    assert not [line for line in steps if "  # " not in line]
