"""What every format and a cache plan cost in videos: digits-video painted by each, beside torch.

    python -m tools.pages.quality_video [--cells fp8 nvfp4+mha ...] [--videos 50] [--steps 10] [--jobs 2]
                                        [--json FILE] [--resume] [--write docs/quality.md]

Each cell is compiled for ONNX Runtime, calibrated on prompts of other noise, and paints the same prompts from the same
noise as the unquantized model in torch, in diffusers' pipeline with `diffc.load`. --write puts the table into the
page's section on videos, and a picture beside the page. --json keeps what is done: a run that was killed goes on with
--resume. Exits with 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import DiffcError
from diffc.models.embedded.digits_video import PIXELS, prompt
from diffc.quality.painting import load_pipeline
from diffc.quality.strips import encode
from diffc.quality.videos import asked_videos, judge_videos, paint_videos
from diffc.runtime.load import load
from passes import PassError
from passes.files.atomic import write_text
from tools.pages.matrix import CELLS
from tools.pages.quality import CALIBRATION_SEED
from tools.pages.quality_table import TORCH
from tools.pages.video_table import PICTURE, SHOWN, picture, section, with_section

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "digits-video"
PLAN = "blocks:every=2"
CACHED = {f"{format}, {PLAN}": format for format in ("none", "fp8")}
"""Cells with a cache plan, and the format of each."""


@dataclass(frozen=True)
class Setup:
    """What all rows of a table have in common."""

    videos: int = 50
    steps: int = 10
    batch: int = 25
    calibration_steps: int = 5


def main() -> int:
    """Run the cells asked for; 1 when one failed."""
    options = _options()
    setup = Setup(options.videos, options.steps)
    rows = [row for row in _kept(options.json, setup) if options.resume and not row["error"]]
    there = {row["cell"] for row in rows}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that follow; there are --jobs of them
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [cell for cell in (TORCH, *options.cells) if cell not in there]
        for done in as_completed([pool.submit(run_cell, cell, setup) for cell in jobs]):
            rows.append(done.result())
            said = {name: value for name, value in rows[-1].items() if name != "strip"}
            print(" ".join(f"{name}={value}" for name, value in said.items()), file=sys.stderr, flush=True)
            _write(rows, options, setup)
    _write(rows, options, setup)
    return int(any(row["error"] for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells = [*CELLS, *CACHED]
    parser.add_argument("--cells", nargs="*", default=cells, choices=cells)
    parser.add_argument("--videos", type=int, default=Setup().videos, help="of each cell")
    parser.add_argument("--steps", type=int, default=Setup().steps)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--resume", action="store_true", help="leave out what the --json file has")
    parser.add_argument(
        "--write", type=Path, help="write the section of this page, and the picture beside it"
    )
    return parser.parse_args()


def _kept(file: Path | None, setup: Setup) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same setup."""
    if file is None or not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return [row for row in rows if (row["videos"], row["steps"]) == (setup.videos, setup.steps)]


def _write(rows: list[dict[str, Any]], options: argparse.Namespace, setup: Setup) -> None:
    """Write the files asked for, rows in the order of the matrix."""
    order = [TORCH, *CELLS, *CACHED]
    rows = sorted(rows, key=lambda row: order.index(row["cell"]))
    if options.json:
        write_text(options.json, json.dumps(rows, indent=1) + "\n")
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        write_text(options.write, with_section(page, section(rows, setup.videos, setup.steps)))
        picture(rows).save(options.write.with_name(PICTURE), optimize=True)


def run_cell(cell: str, setup: Setup) -> dict[str, Any]:
    """One cell; what went wrong is in the row, not raised."""
    row: dict[str, Any] = {"cell": cell, "error": "", "videos": setup.videos, "steps": setup.steps}
    try:
        reference = paint_videos(load_pipeline(MODEL), setup.videos, steps=setup.steps, batch=setup.batch)
        if cell == TORCH:
            return row | _described(reference, reference)
        with tempfile.TemporaryDirectory(prefix="diffc-quality-") as folder:
            return row | _compiled(cell, Path(folder), reference, setup)
    except (DiffcError, PassError) as error:
        row["error"] = str(error)
    except Exception as error:  # a defect in one cell must not lose the others
        row["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    return row


def _compiled(cell: str, folder: Path, reference: Tensor, setup: Setup) -> dict[str, Any]:
    request = cell_request(cell, folder / "artifact", setup)
    started = time.perf_counter()
    compile_model(request)
    compiled = time.perf_counter()
    pipe = load_pipeline(MODEL)
    with load(request.output, target="ort", dtype=reference.dtype) as backbone:
        pipe.transformer = backbone
        videos = paint_videos(pipe, setup.videos, steps=setup.steps, batch=setup.batch)
        report = backbone.cache_report()
    row = {"compile_s": round(compiled - started, 1), "paint_s": round(time.perf_counter() - compiled, 1)}
    return row | {"reused": report.reused / max(1, report.steps)} | _described(videos, reference)


def cell_request(cell: str, output: Path, setup: Setup) -> CompileRequest:
    """The compile of a cell: float16, since ONNX Runtime computes no bfloat16 on the CPU."""
    format, options = CELLS[CACHED.get(cell, cell)]
    return CompileRequest(
        MODEL,
        output,
        format,
        ("ort",),
        dtype="float16",
        options=options,
        prompts=tuple(prompt(*asked) for asked in asked_videos(10)),
        steps=setup.calibration_steps,
        batch_size=10,
        image_size=PIXELS,
        seed=CALIBRATION_SEED,
        cache_plan=PLAN if cell in CACHED else "",
        skip_validation=True,
    )


def _described(videos: Tensor, reference: Tensor) -> dict[str, Any]:
    return asdict(judge_videos(videos, reference)) | {"strip": encode(videos[SHOWN].nan_to_num())}


if __name__ == "__main__":
    raise SystemExit(main())
