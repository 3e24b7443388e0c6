"""The line of `diffc sweep`: several values after one option, a file of options, no secret in what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.cli.sweep_options import of_file, spelled_out, without_secret
from diffc.errors import DiffcError


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("--sm 89 120 -o out", "--sm 89 --sm 120 -o out"),
        ("file.yaml --format fp8 int8 --steps 2", "file.yaml --format fp8 --format int8 --steps 2"),
        ("-f fp8 int8 --sm=89", "-f fp8 -f int8 --sm=89"),
        ("--bench --validate", "--bench eager --validate"),
        ("--bench none --evaluate", "--bench none --evaluate psnr --evaluate ssim"),
        ("", ""),
    ],
)
def test_options_of_several_values(typed: str, means: str) -> None:
    assert list(spelled_out(typed.split())) == means.split()


@pytest.mark.parametrize("typed", ["--sm --steps 2", "--steps 2 --sm"])
def test_an_axis_without_a_value_is_told(typed: str) -> None:
    with pytest.raises(DiffcError, match="--sm has no value"):
        list(spelled_out(typed.split()))


def test_a_file_has_the_options_as_keys(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "model: [tiny-sd3, tiny-flux]\nimage_size: 64\nvalidate: true\nquantize-mha: false\nbench: []\n"
        "exclude:\n - {format: nvfp4, sm: [86, 89]}\n - model=tiny-*\nsteps: 2\n",
        encoding="utf-8",
    )
    words = list(spelled_out(of_file(file, {"--steps"})))
    assert words == [
        *(
            "--model",
            "tiny-sd3",
            "--model",
            "tiny-flux",
            "--image-size",
            "64",
            "--validate",
            "--bench",
            "eager",
        ),
        *("--exclude", "format=nvfp4,sm=86|89", "--exclude", "model=tiny-*"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "has no options"),
        ("1: 2\n", "has no options"),
        ("model: {a: b}\n", "model is a mapping"),
        ("model: [[a]]\n", "model has the value"),
        ("model: [true]\n", "model has the value True"),
        ("model: *x\n", "cannot read the file of options"),
        ("a: [", "cannot read the file of options"),
    ],
)
def test_a_wrong_file_is_one_message(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DiffcError, match=said):
        of_file(file, set())


def test_a_file_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="cannot read the file of options: no such file"):
        of_file(tmp_path / "none.yaml", set())


def test_a_token_is_not_kept() -> None:
    words = ["--model", "a", "--token", "hf_secret", "--sm", "89", "--token=hf_secret"]
    assert without_secret(words) == ["--model", "a", "--sm", "89"]
