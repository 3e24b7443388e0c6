"""The page of an artifact: all that it holds is there, nothing of a file acts, and what cannot be is refused first."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from diffc.errors import DiffcError, UsageError
from diffc.progress import Silent
from diffc.report.build import report
from diffc.report.request import ReportRequest
from diffc.sweep.rows import SUMMARY, Row, Step, Summary
from tests.report.made import HOSTILE, PATH, made

BENCH = {"rows": [{"side": "compiled", "median": 0.002}, {"side": "eager", "median": 0.005}]}
_MEAN = {"mean": 20.5, "low": 20.0, "high": 21.0}
SCORES = {"reference": "torch", "scores": [{"model": HOSTILE, "metric": "psnr", "value": _MEAN}]}


class Page(HTMLParser):
    """The elements and attributes of a page, its text, and the sections that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.sections: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag == "section":
            self.sections.append(dict(attrs)["id"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def written(folder: Path, what: Path, **settings: object) -> Page:
    output = folder / "report.html"
    size = report(ReportRequest(what, output, **settings), Silent())  # type: ignore[arg-type]
    assert size == output.stat().st_size
    return Page(output.read_text(encoding="utf-8"))


def check_harmless(page: Page) -> None:
    assert "script" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(link.startswith(("#", "data:")) for link in page.links)


def test_a_hostile_artifact_is_shown_and_does_nothing(tmp_path: Path) -> None:
    for name, content in (("bench", BENCH), ("scores", SCORES)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    artifact = made(tmp_path / "<b>hostile")
    given = {name: tmp_path / f"{name}.json" for name in ("bench", "scores")}
    page = written(tmp_path, artifact.folder, **given)
    check_harmless(page)
    assert page.sections == [
        *(
            "summary",
            "pictures",
            "tradeoffs",
            "passes",
            "layers",
            "errors",
            "engines",
            "stages",
            "cache",
            "repeat",
        )
    ]
    assert page.text.count(HOSTILE) > 15
    for told in (
        "weight …: rounds",
        "9 → 4",
        "MATRIX_MULTIPLY",
        "2.0e-04",
        "write weights",
        "FP8",
        "20 to 21",
    ):
        assert told in page.text, told
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text


def test_two_artifacts_stand_beside_each_other(tmp_path: Path) -> None:
    one = made(tmp_path / "one", PATH)
    other = made(tmp_path / "other", "blocks.0.attn.to_k", format="nvfp4")
    page = written(tmp_path, one.folder, against=other.folder)
    assert page.sections[:2] == ["summary", "differences"]
    for told in (
        "nvfp4",
        "Layers whose formats differ: 2 of 2",
        "nodes after the passes that all targets share",
    ):
        assert told in page.text, told


def test_a_copy_without_what_is_optional_says_so(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", PATH).folder
    for name in ("records/passes.json", "records/run.json", "engines/e.network.json", "engines/e.engine"):
        (folder / name).unlink()
    page = written(tmp_path, folder)
    assert "does not hold the counts of nodes" in page.text
    assert "no account of its layers" in page.text
    assert "does not say how long" in page.text


def row(cell: str, **settings: object) -> Row:
    known = {"model": "m", "format": cell, "sm": None, "cache_plan": "", "loras": [], "dtype": "float16"}
    return Row(cell=cell, status="done", **(known | settings))  # type: ignore[arg-type]


def test_a_sweep_has_its_cells_its_messages_and_its_artifacts(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    made(folder / "fp8", PATH)
    bench = {"bench": Step("done", 1.0, result=BENCH), "evaluate": Step("done", 1.0, result=SCORES)}
    cells = [
        row("fp8", sizes={"weights": 100}, steps=bench, errors={"float32": 1e-3}),
        row("int8", sizes={"weights": 200}, steps=bench),
        row("../fp8", sizes={"weights": 200}),
        msgspec.structs.replace(row("nvfp4"), status="failed", message=f"no {HOSTILE}\n  Fix: give another"),
    ]
    counts = {"cells": 4, "done": 3, "failed": 1}
    summary = Summary(
        1,
        "0.1",
        {},
        ["diffc", "sweep", HOSTILE],
        "finished",
        "now",
        9.0,
        1,
        2,
        "",
        {"model": ["m"]},
        counts,
        cells,
    )
    (folder / SUMMARY).write_bytes(msgspec.json.encode(summary))
    for cell, file in (("fp8", "b.png"), ("int8", "../../../secret.png")):
        (home := folder / "pictures" / cell).mkdir(parents=True)
        entry = {"prompt": HOSTILE, "images": {"compiled": file, "torch": "a.png"}}
        (home / "pictures.json").write_text(json.dumps([entry]), encoding="utf-8")
        for name in ("a.png", file):
            Image.new("RGB", (8, 8)).save(home / name)
    page = written(tmp_path, folder)
    check_harmless(page)
    assert page.sections == ["sweep", "pictures", "tradeoffs", "cells"]
    assert (
        len([link for link in page.links if link.startswith("data:image")]) == 2
    )  # the other cell reaches outside
    for told in (f"no {HOSTILE}", "1.0e-03", "2.0", "20.5", "diffc compile"):
        assert told in page.text, told
    with pytest.raises(UsageError, match="--layers is for an artifact"):
        written(tmp_path, folder, layers=True)


def test_what_cannot_be_written_or_read_is_refused(tmp_path: Path) -> None:
    artifact = made(tmp_path / "a", PATH)
    with pytest.raises(UsageError, match=r"is not the name of a page"):
        report(ReportRequest(artifact.folder, tmp_path / "report.pdf"), Silent())
    with pytest.raises(DiffcError, match="does not exist"):
        report(ReportRequest(artifact.folder, tmp_path / "no" / "report.html"), Silent())
    with pytest.raises(DiffcError, match="not a diffc artifact"):
        written(tmp_path, tmp_path)
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(DiffcError, match="rows"):
        written(tmp_path, artifact.folder, bench=tmp_path / "bench.json")
    (artifact.folder / "records" / "passes.json").write_bytes(
        b" " * artifact.manifest["files"]["records/passes.json"]["bytes"]
    )
    with pytest.raises(DiffcError, match=r"passes\.json"):
        written(tmp_path, artifact.folder)
    assert not (tmp_path / "report.html").exists()
