"""Flushing while a file is written: the bytes stay the same, one flush runs at a time, and no error of one is lost."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from passes.base import PassError
from passes.storage import save
from passes.weights import flush as flushing
from passes.weights.flush import Flusher
from passes.weights.sources import keep

RNG = np.random.default_rng(4)


def model(count: int) -> onnx.ModelProto:
    """A model with `count` weights of 64 KB."""
    recipes = {f"w{i}": keep(RNG.standard_normal((128, 128)).astype(np.float32)) for i in range(count)}
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in recipes]
    outputs = [helper.make_tensor_value_info(f"{n}_out", r.dtype, r.shape) for n, r in recipes.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, [r.to_tensor(n) for n, r in recipes.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(_: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_flushing_on_the_way_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, flushes = model(12), list[int]()
    plain = save(made, tmp_path / "plain.onnx")
    monkeypatch.setattr(flushing, "EVERY", 1)
    monkeypatch.setattr(flushing, "_flush", flushes.append)
    often = save(made, tmp_path / "often.onnx")
    assert flushes
    assert [file.nbytes for file in plain] == [file.nbytes for file in often]
    assert plain[1].sha256 == often[1].sha256


def test_a_disk_that_is_full_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushing, "EVERY", 1)
    monkeypatch.setattr(flushing, "_flush", full)
    with pytest.raises(PassError, match="no space left"):
        save(model(4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("later", ["grown", "finish"])
def test_an_error_on_the_way_is_raised_though_a_later_flush_sees_none(
    later: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushing, "EVERY", 100)
    monkeypatch.setattr(flushing, "_flush", broken)
    with (tmp_path / "file").open("wb") as file, Flusher(file.fileno()) as disk:
        disk.grown(100)
        monkeypatch.setattr(flushing, "_flush", os.fsync)
        disk._pool.submit(int).result()  # what was submitted before it has run
        with pytest.raises(OSError, match="Input/output"):
            disk.grown(101) if later == "grown" else disk.finish()


def test_one_flush_at_a_time_and_nobody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, calls = threading.Event(), threading.Event(), list[int]()

    def slow(descriptor: int) -> None:
        calls.append(descriptor)
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr(flushing, "EVERY", 100)
    monkeypatch.setattr(flushing, "_flush", slow)
    with (tmp_path / "file").open("wb") as file, Flusher(file.fileno()) as disk:
        disk.grown(99)
        assert not calls
        disk.grown(150)
        assert begun.wait(60)
        for length in range(200, 1000, 100):
            disk.grown(length)  # would hang if it waited
        assert len(calls) == 1
        go.set()
        disk.finish()
        disk.grown(1000)
        disk.finish()
    assert len(calls) == 2
