"""What every format costs in pictures: each trained model painted by each cell of the acceptance matrix, beside torch.

    python -m tools.pages.quality [--models digits-sd3 ...] [--cells fp8 nvfp4+mha ...] [--images 100] [--steps 10]
                                  [--keep PATTERN ...] [--jobs 2] [--json FILE] [--resume] [--write docs/quality.md]

Each cell is compiled for ONNX Runtime, calibrated on the digits' prompts and other noise, and paints the same prompts
from the same noise as the unquantized model in torch, in diffusers' pipeline with `diffc.load`. A cell that misses its
limit is followed by the noise of each of its layers; --layers does so for all. --json keeps what is done: a run that
was killed goes on with --resume. Exits with 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import DiffcError
from diffc.models.embedded import digits
from diffc.models.sources.locate import locate
from diffc.quality.layers import measured, quantized_layers
from diffc.quality.painting import judge, load_pipeline, paint
from diffc.quality.strips import encode
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.simulate import cpu_block_quant
from diffc.runtime.load import load
from diffc.validate.torch_reference import reference_model
from passes import PassError
from passes.files.atomic import write_text
from tools.pages.matrix import CELLS, VARIANTS
from tools.pages.quality_table import TORCH, lost, markdown, sheets, terminal
from tools.pages.video_table import section_of, with_section

if TYPE_CHECKING:
    from torch import Tensor


MODELS = ("digits-sd3", "digits-flux", "digits-sdxl")
CALIBRATION_SEED = 10_000  # noise that no picture of the table starts from
LAYER_IMAGES = 10  # pictures during which the layers' noise is taken: one of each digit


@dataclass(frozen=True)
class Setup:
    """What all rows of a table have in common."""

    images: int = 100
    steps: int = 10
    batch: int = 25  # 50 with guidance; the UNet is traced for 63 at most, and 100 are hardly faster an image
    calibration_steps: int = 5
    keep: tuple[str, ...] = ()
    layers: bool = False

    def key(self) -> dict[str, Any]:
        """What a row must agree with to be taken over from an earlier run."""
        return {"images": self.images, "steps": self.steps, "keep": list(self.keep)}


def main() -> int:
    """Run the cells asked for; 1 when one failed."""
    options = _options(list(VARIANTS))
    setup = Setup(
        options.images,
        options.steps,
        options.batch,
        options.calibration_steps,
        tuple(options.keep),
        options.layers,
    )
    rows = [row for row in kept(options.json, setup) if options.resume and not row["error"]]
    there = {(row["model"], row["cell"]) for row in rows}
    jobs = [(m, c) for c in (TORCH, *options.cells) for m in options.models if (m, c) not in there]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that follow; there are --jobs of them
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_cell, *job, setup) for job in jobs]):
            rows.append(done.result())
            _say(rows[-1])
            _write(rows, options, [TORCH, *VARIANTS])
    Console(width=160).print(terminal(_write(rows, options, [TORCH, *VARIANTS])))
    return int(any(row["error"] for row in rows))


def _options(cells: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Setup()
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=cells)
    parser.add_argument("--images", type=int, default=usual.images, help="of each cell")
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--batch", type=int, default=usual.batch, help="images painted at a time")
    parser.add_argument("--calibration-steps", type=int, default=usual.calibration_steps)
    parser.add_argument("--keep", nargs="+", default=[], help="modules that stay unquantized in every cell")
    parser.add_argument("--layers", action="store_true", help="the noise of each layer for every cell")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--resume", action="store_true", help="leave out what the --json file has")
    parser.add_argument("--write", type=Path, help="write the page, and the pictures beside it")
    return parser.parse_args()


def kept(file: Path | None, setup: Setup) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same setup."""
    if file is None or not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return [row for row in rows if setup.key().items() <= row.items()]


def _say(row: dict[str, Any]) -> None:
    shown = {k: v for k, v in row.items() if k not in ("strip", "read", "layers")}
    print(" ".join(f"{k}={v}" for k, v in shown.items()), file=sys.stderr, flush=True)


def _write(
    rows: list[dict[str, Any]], options: argparse.Namespace, cells: Sequence[str]
) -> list[dict[str, Any]]:
    """Write the files asked for, rows in the order of the matrix; returns them in that order."""
    order = [(model, cell) for model in MODELS for cell in cells]
    rows = sorted(rows, key=lambda row: order.index((row["model"], row["cell"])))
    if options.json:
        write_text(
            options.json, json.dumps(rows, indent=1) + "\n"
        )  # killed while it writes, it loses nothing
    if options.write:
        before = options.write.read_text(encoding="utf-8") if options.write.is_file() else ""
        page = with_section(markdown(rows), section_of(before))  # that of tools/pages/quality_video.py
        options.write.write_text(page, encoding="utf-8", newline="\n")
        for name, image in sheets(rows).items():
            image.save(options.write.with_name(name), optimize=True)
    return rows


def run_cell(model: str, cell: str, setup: Setup) -> dict[str, Any]:
    """One cell of one model; what went wrong is in the row, not raised."""
    row: dict[str, Any] = {"model": model, "cell": cell, "error": "", **setup.key()}
    try:
        with tempfile.TemporaryDirectory(prefix="diffc-quality-") as folder:
            row |= _reference_row(model, setup) if cell == TORCH else _row(model, cell, Path(folder), setup)
    except (DiffcError, PassError) as error:
        row["error"] = str(error)
    except Exception as error:  # a defect in one cell must not lose the others
        row["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    return row


def _reference_row(model: str, setup: Setup) -> dict[str, Any]:
    images, seconds = _reference(model, setup)
    return {"compile_s": 0.0, "paint_s": seconds} | _described(images, images)


def _row(model: str, cell: str, folder: Path, setup: Setup) -> dict[str, Any]:
    reference, _ = _reference(model, setup)
    request = cell_request(model, cell, folder / "artifact", setup)
    started = time.perf_counter()
    compile_model(request)
    compiled = time.perf_counter()
    with load(request.output, target="ort", dtype=reference.dtype) as backbone:
        images = _painted(model, backbone, setup)
    row: dict[str, Any] = {
        "compile_s": round(compiled - started, 1),
        "paint_s": round(time.perf_counter() - compiled, 1),
    }
    row |= _described(images, reference)
    right = _described(reference, reference)["right"]
    if request.format != "none" and (setup.layers or lost(cell, row["right"], right)):
        row["layers"] = layer_table(request, setup)
    return row


def cell_request(model: str, cell: str, output: Path, setup: Setup) -> CompileRequest:
    """The compile of a cell: float16, since ONNX Runtime computes no bfloat16 on the CPU."""
    format, options = VARIANTS[cell]
    return CompileRequest(
        model,
        output,
        format,
        ("ort",),
        dtype="float16",
        options=replace(options, keep=setup.keep),
        prompts=tuple(digits.prompt(digit) for digit in range(10)),
        steps=setup.calibration_steps,
        batch_size=10,
        image_size=digits.PIXELS,
        seed=CALIBRATION_SEED,
        skip_validation=True,  # tools/pages/matrix.py validates each of these cells
    )


def layer_table(request: CompileRequest, setup: Setup) -> list[dict[str, Any]]:
    """Path and SNR (dB) of each quantized layer while the unquantized model paints, the noisiest first."""
    checkpoint = Checkpoint.load(request.output / "checkpoint")
    quantized = reference_model(locate(request.model), request.dtype, checkpoint)
    pipe, component = _pipeline(request.model)
    paths = quantized_layers(quantized)
    with cpu_block_quant(), measured(getattr(pipe, component), quantized, paths) as sums:
        paint(pipe, LAYER_IMAGES, steps=setup.steps, batch=LAYER_IMAGES)
    rows = [{"path": path, "snr": round(sums[path].snr, 1)} for path in paths]
    return sorted(rows, key=lambda row: float(row["snr"]))


def _described(images: Tensor, reference: Tensor) -> dict[str, Any]:
    figures = asdict(judge(images, reference))
    return figures | {"strip": encode(images[:10].nan_to_num())}


def _painted(model: str, backbone: Any, setup: Setup) -> Tensor:
    """The images of the model's pipeline with `backbone` in the place of its own."""
    pipe, component = _pipeline(model)
    with _swapped(pipe, component, backbone):
        images: Tensor = paint(pipe, setup.images, steps=setup.steps, batch=setup.batch)
        return images


@contextmanager
def _swapped(pipe: Any, component: str, backbone: Any) -> Iterator[None]:
    own = getattr(pipe, component)
    setattr(pipe, component, backbone)
    try:
        yield
    finally:
        setattr(pipe, component, own)


@lru_cache(maxsize=3)
def _pipeline(model: str) -> tuple[Any, str]:
    """The pipeline with its own backbone, and the backbone's name in it; once in each process."""
    return load_pipeline(model), digits.BACKBONES[model]


@lru_cache(maxsize=3)
def _reference(model: str, setup: Setup) -> tuple[Tensor, float]:
    """The images of the unquantized torch model, and the seconds they took; once in each process."""
    pipe, component = _pipeline(model)
    started = time.perf_counter()
    images = _painted(model, getattr(pipe, component), setup)
    return images, round(time.perf_counter() - started, 1)


if __name__ == "__main__":
    sys.exit(main())
