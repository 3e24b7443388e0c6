"""A manifest whose fields cannot be right is refused by diffc.load, not by the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diffc
from diffc.errors import DiffcError
from tests import DATA

HARM: dict[str, Callable[[dict[str, Any]], object]] = {
    "no inputs": lambda m: m.update(inputs=[]),
    "no outputs": lambda m: m.update(outputs=[]),
    "a patch of nothing": lambda m: m["model"]["config"].update(patch_size=0),
    "an input of no name": lambda m: m["inputs"][0].update(name=""),
    "a type that nothing feeds": lambda m: m["inputs"][0].update(dtype="STRING"),
    "a dimension below zero": lambda m: m["inputs"][0].update(dims=[-1, 4]),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_lie_in_the_manifest(harm: str, tmp_path: Path) -> None:
    manifest = json.loads((DATA / "manifest-schema-1.json").read_text("utf-8"))
    for name, entry in manifest["files"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(entry["bytes"])
    HARM[harm](manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DiffcError, match=r"(manifest|hidden_states)[\s\S]*\n  Fix: "):
        diffc.load(tmp_path)
