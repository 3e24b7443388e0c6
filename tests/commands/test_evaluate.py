"""`diffc evaluate`: the table, the JSON and the sheet of small networks, and what is refused before any is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffc.cli.main import run
from diffc.commands.evaluate.painting import PICTURES, Painting
from diffc.commands.evaluate.request import EvaluateRequest
from diffc.commands.evaluate.run import evaluate
from diffc.errors import DiffcError
from diffc.progress import Silent
from diffc.quality.metrics.entries import as_tensor, read_entries
from diffc.quality.pictures import psnr
from tests.conftest import Cells
from tests.quality.metrics.pictures import MODELS, data, small_clip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_clip(tmp_path_factory.mktemp("clip"))


def test_scores_of_every_model(pictures: Path, clip: Path) -> None:
    metrics = ("clip", "clip-iqa", "psnr", "ssim", "clip-fid")
    found = evaluate(EvaluateRequest(pictures, metrics, clip_model=str(clip)), Silent())
    by_place = {(s.model, s.metric): s for s in found.scores}
    assert found.reference == "torch"
    assert {m for m, k in by_place if k == "clip"} == set(MODELS)
    assert {m for m, k in by_place if k == "psnr"} == {"fp8", "nvfp4"}
    near, far = by_place["fp8", "psnr"].value.mean, by_place["nvfp4", "psnr"].value.mean
    assert near > far + 3
    names = ("fp8-0.png", "torch-0.png")
    one, other = (as_tensor(Image.open(pictures.parent / name)) for name in names)
    assert by_place["fp8", "psnr"].each[0] == pytest.approx(psnr(one, other))
    difference = by_place["fp8", "clip"].difference
    assert difference is not None
    expected = by_place["fp8", "clip"].value.mean - by_place["torch", "clip"].value.mean
    assert difference.mean == pytest.approx(expected)
    assert by_place["nvfp4", "clip-fid"].value.mean > by_place["fp8", "clip-fid"].value.mean > 0


def test_the_command_prints_writes_and_takes_metrics_as_modelopt_does(
    pictures: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, figures = tmp_path / "sheet.png", tmp_path / "figures.json"
    arguments = [
        "--data-path",
        str(pictures),
        "--metrics",
        "clip-iqa",
        "clip",
        "psnr",
        "--clip-model",
        str(clip),
    ]
    assert (
        run(["evaluate", *arguments, "--reference", "fp8", "--sheet", str(sheet), "--json", str(figures)])
        == 0
    )
    out = capsys.readouterr().out
    assert "fp8 (reference)" in out
    assert "3 prompts: differences inside the intervals prove nothing" in out
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert [s["metric"] for s in written["scores"]].count("clip-iqa") == 3
    with Image.open(sheet) as image:
        assert image.width > image.height / 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metrics": ("clp",)}, "unknown metric 'clp'. Known: imagereward"),
        ({"reference": "int8"}, "unknown reference 'int8'. Known: torch, fp8, nvfp4"),
        ({"metrics": ("lpips",)}, "lpips needs AlexNet's weights"),
        ({"metrics": ("fid",)}, "fid needs torch-fidelity"),
    ],
)
def test_what_cannot_be_judged_is_refused(changed: dict[str, Any], message: str, pictures: Path) -> None:
    with pytest.raises(DiffcError, match=message.replace(".", r"\.")):
        evaluate(EvaluateRequest(pictures, **{"metrics": ("psnr",), **changed}), Silent())


def test_files_that_are_no_data_are_told(pictures: Path, tmp_path: Path) -> None:
    def refused(content: object) -> str:
        file = pictures.parent / "other.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(DiffcError) as error:
            evaluate(EvaluateRequest(file, ("psnr",)), Silent())
        return str(error.value)

    both = {"torch": "torch-0.png", "fp8": "fp8-0.png"}
    assert "is not a list of prompts" in refused({})
    assert 'entry 1 has no "prompt" and "images"' in refused([{"prompt": "a"}])
    assert "for prompt 1 is missing" in refused([{"prompt": "a", "images": {"x": "no.png"}}])
    alone = [{"prompt": "a", "images": both}, {"prompt": "b", "images": {"torch": "torch-1.png"}}]
    assert "prompt 2 has other models than the first: fp8" in refused(alone)
    assert "there is one model alone" in refused([{"prompt": "a", "images": {"torch": "torch-0.png"}}])
    Image.new("RGB", (8, 8)).save(pictures.parent / "small.png")
    assert "is 8x8" in refused([{"prompt": "a", "images": {**both, "fp8": "small.png"}}])
    with pytest.raises(DiffcError, match="no such file"):
        evaluate(EvaluateRequest(tmp_path / "none.json"), Silent())


def test_artifacts_paint_what_is_judged_and_pictures_that_are_kept_stay(
    compiled: Cells, tmp_path: Path
) -> None:
    artifact = compiled("digits-sd3", "none", targets=("ort",), sms=(), dtype="float32", skip_validation=True)
    painting = Painting((artifact.folder,), ("a handwritten seven", "a handwritten one"), steps=2)
    request = EvaluateRequest(None, ("psnr",), painting=painting, pictures=tmp_path / "kept")
    score, *others = evaluate(request, Silent()).scores
    assert (score.model, others) == (artifact.folder.name, [])
    assert all(value > 50 for value in score.each)  # the same noise, and the same model in float32
    entries = read_entries(tmp_path / "kept" / PICTURES)
    assert [entry.prompt for entry in entries] == list(painting.prompts)
    assert entries[0].images["torch"].read_bytes() != entries[1].images["torch"].read_bytes()
    kept = entries[1].images["torch"]
    white = Image.new("RGB", Image.open(kept).size, "white")
    white.save(kept)
    assert evaluate(request, Silent()).scores[0].each[1] < 20  # what is there is not painted again
    changed = replace(request, painting=replace(painting, seed=1))
    with pytest.raises(DiffcError, match="holds pictures of other prompts, artifacts or settings"):
        evaluate(changed, Silent())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "pictures are judged that are there, or that artifacts paint"),
        ({"painting": Painting((), ("a fox",))}, "there is nothing to paint"),
        ({"painting": Painting((Path("a"), Path("a")), ("a fox",))}, "an artifact is given twice"),
        ({"painting": Painting((Path("a"),), ("a fox",), torch=False)}, "there is one model alone"),
        ({"painting": Painting((Path("a"),), ("a fox",))}, "there is nothing at a"),
    ],
)
def test_paintings_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffcError, match=message):
        evaluate(EvaluateRequest(None, ("psnr",), **changed), Silent())
