"""A calibration goes out in a layout of others and comes back: what is compiled of it holds the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from diffc.commands.export.run import ExportRequest, export
from diffc.compile.spine import CompileRequest, compile_model
from diffc.quantize.options import QuantOptions


def request(output: Path) -> CompileRequest:
    """tiny-sd3 in FP8; the one convolution stays as it is, since no layout but mto and diffusers has a place for it."""
    return CompileRequest(
        "tiny-sd3",
        output,
        "fp8",
        calibrate="synthetic",
        image_size=64,
        options=QuantOptions(keep=("pos_embed.proj",)),
        skip_validation=True,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact whose calibration is exported."""
    folder = tmp_path_factory.mktemp("round-trip") / "first"
    compile_model(request(folder))
    return folder


def stored(folder: Path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every initializer."""
    model = onnx.load(folder / "model.onnx")
    return {t.name: (t.data_type, tuple(t.dims), t.raw_data) for t in model.graph.initializer}


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("layout", ["modelopt-hf", "comfyui", "diffusers", "mto"])
def test_the_same_bytes_come_back(layout: str, first: Path, tmp_path: Path) -> None:
    ends = {"comfyui": ".safetensors", "mto": ".pt"}
    place = tmp_path / f"out{ends.get(layout, '')}"
    export(ExportRequest(first, layout, place))
    again = request(tmp_path / "again")
    if layout == "mto":
        again = replace(again, from_checkpoint=place)
    elif layout == "diffusers":
        again = replace(again, model=str(place), from_checkpoint=first / "checkpoint")
    else:
        again = replace(
            again, model=str(place), format="stored", calibrate="pipeline", options=QuantOptions()
        )
    compile_model(again)
    before, after = stored(first), stored(again.output)
    assert after.keys() == before.keys()
    assert [name for name, value in before.items() if after[name] != value] == []
