"""Formats for groups of layers: the least noise within a size."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from diffc.errors import DiffcError, UsageError
from diffc.quality.mixing import Group, choose, read_plan, total_bits, write_plan

BITS = {"nvfp4": 4.5, "fp8": 8.0, "int8": 8.0, "none": 16.0}


def groups_of(seed: int, count: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        weights = float(rng.integers(1, 9))
        scale = rng.lognormal(0, 2)
        noise = {
            "nvfp4": scale,
            "fp8": scale * rng.uniform(0.01, 1.2),
            "int8": scale * rng.uniform(0.01, 1.2),
        }
        bits = {name: weights * b for name, b in BITS.items()}
        groups.append(Group((f"layer{number}",), {**noise, "none": 0.0}, bits))
    return groups


def noise_of(groups: list[Group], formats: tuple[str, ...] | list[str]) -> float:
    return sum(group.noise[name] for group, name in zip(groups, formats, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_is_near_the_best_of_all_and_never_too_large(seed: int) -> None:
    groups = groups_of(seed, 6)
    everything = [(noise_of(groups, f), total_bits(groups, f)) for f in product(BITS, repeat=6)]
    least, most = (total_bits(groups, [name] * 6) for name in ("nvfp4", "none"))
    shares = []
    for budget in np.linspace(least, most, 12):
        chosen = choose(groups, float(budget))
        assert total_bits(groups, chosen) <= budget
        best = min(noise for noise, bits in everything if bits <= budget)
        worst_single = max(group.noise["nvfp4"] for group in groups)
        shares.append((noise_of(groups, chosen) - best) / worst_single)
        assert (
            noise_of(groups, chosen) <= best + worst_single
        )  # a greedy choice is one step from the best at most
    assert np.mean(shares) < 0.1
    assert choose(groups, most) == ["none"] * 6


def test_a_format_that_is_larger_and_worse_is_never_chosen() -> None:
    group = Group(("a",), {"nvfp4": 1.0, "fp8": 2.0, "none": 0.0}, {"nvfp4": 4.0, "fp8": 8.0, "none": 16.0})
    assert choose([group], 15) == ["nvfp4"]
    assert choose([group], 16) == ["none"]


def test_a_size_that_nothing_has_is_refused() -> None:
    with pytest.raises(UsageError, match="the smallest formats take") as caught:
        choose(groups_of(1, 3), 1.0)
    assert "--format" in str(caught.value.fix)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    formats = {"blocks.0.to_q": "nvfp4", "blocks.0.ff": "none"}
    write_plan(tmp_path / "a.json", formats, {"bits": 5.5})
    assert read_plan(tmp_path / "a.json") == formats
    for text in ("", "[]", '{"formats": 3}', '{"formats": {"a": 8}}'):
        (tmp_path / "b.json").write_text(text, encoding="utf-8")
        with pytest.raises(DiffcError, match="cannot read the plan"):
            read_plan(tmp_path / "b.json")
