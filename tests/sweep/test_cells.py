"""Cells: every combination once, names that stay and never meet, and what --exclude leaves out."""

from __future__ import annotations

import itertools

import pytest

from diffc.errors import DiffcError, UsageError
from diffc.sweep.cells import Axes, Cell
from passes.files.contained import safe_name


def names(axes: Axes, *exclude: str) -> list[str]:
    return [cell.name for cell in axes.cells(exclude)]


def test_every_combination_once_the_gpus_last() -> None:
    axes = Axes(["tiny-sd3", "tiny-flux", "tiny-sd3"], ["fp8", "FP8", "none"], ["89", "sm_120"])
    wanted = itertools.product(("tiny-sd3", "tiny-flux"), ("fp8", "none"), ("sm89", "sm120"))
    assert names(axes) == ["-".join(each) for each in wanted]


def test_a_cell_without_gpu_plan_and_lora_has_none_in_its_name() -> None:
    assert names(Axes(["tiny-sd3"], ["fp8"])) == ["tiny-sd3-fp8"]
    assert names(Axes(["tiny-sd3"], ["fp8"], dtypes=["bfloat16"])) == ["tiny-sd3-fp8-bfloat16"]


def test_texts_that_become_one_name_have_another_end() -> None:
    found = names(
        Axes(["a/model", "b/model"], ["fp8"], cache_plans=["none", "deepcache:every=2", "deepcache:every_2"])
    )
    assert len(set(found)) == 6
    assert all(name.startswith("model-fp8") and safe_name(name) == name for name in found)
    assert found == names(
        Axes(["a/model", "b/model"], ["fp8"], cache_plans=["none", "deepcache:every=2", "deepcache:every_2"])
    )


@pytest.mark.parametrize(
    "text", ["../../etc", "a:b\\c", "con", "a" * 300, "model ", "\u65e5\u672c", "...", "x/../y/", "a\nb"]
)
def test_a_name_is_one_part_of_a_path_on_every_system(text: str) -> None:
    name = Cell(text, "fp8", 89, f"plan:{text}", (text,)).name
    assert safe_name(name) == name
    assert len(name) < 100


def test_two_loras_of_one_value_are_in_one_cell() -> None:
    axes = Axes(["tiny-sd3"], ["none"], loras=["none", "a.safetensors=0.5 + b.safetensors"])
    assert [cell.loras for cell in axes.cells()] == [(), ("a.safetensors=0.5", "b.safetensors")]


def test_exclude_takes_all_of_its_conditions_together() -> None:
    axes = Axes(["tiny-sd3", "tiny-flux"], ["fp8", "nvfp4"], ["89", "120"])
    assert names(axes, "format=nvfp4,sm=75|89", "model=*-flux") == [
        "tiny-sd3-fp8-sm89",
        "tiny-sd3-fp8-sm120",
        "tiny-sd3-nvfp4-sm120",
    ]


def test_exclude_of_a_plan_with_a_comma() -> None:
    axes = Axes(["m"], ["fp8"], cache_plans=["none", "deepcache:every=2,depth=1"])
    assert len(names(axes, "cache-plan=deepcache:every=2,depth=1,format=fp8")) == 1


@pytest.mark.parametrize(
    ("exclude", "said"),
    [("speed=3", "unknown axis of --exclude 'speed'"), ("fp8", "--exclude is 'fp8'"), ("model=*", "no cell")],
)
def test_a_wrong_exclude_is_told(exclude: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        names(Axes(["tiny-sd3"], ["fp8"]), exclude)


def test_wrong_values_of_an_axis_are_told() -> None:
    with pytest.raises(DiffcError, match="unknown compute capability 'rtx'"):
        names(Axes(["tiny-sd3"], ["fp8"], ["rtx"]))
