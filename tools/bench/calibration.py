"""What calibration takes in bounded room, beside the whole model: card, host memory, seconds a step, and the same amax.

    python -m tools.bench.calibration flux-dev fp8 --folder DIR --caps 4 8 [--steps 4] [--pixels 1024]

Makes a pipeline of the model's full size with seeded random weights in DIR (once; CLIP-L and T5-XXL of their full size
too), and calibrates it in processes of its own: whole, and in bounded room for each cap. The cap is GB of the card that
torch may take (`torch.cuda.set_per_process_memory_fraction`); weights get as much of it as on a card of that size.
"host" is the peak of memory that is no file cache (RssAnon). "step_s" is seconds for a step of one batch, whatever
number of batches goes through at once; `--one-by-one` adds a row without that. Only the first bounded row of a DIR
loads the encoders: the others take its encoded prompts. "stream" says where the time of copies went: the GB that
came to the card, the seconds that the layers waited for them, the seconds that `--threads` spent filling pinned buffers
and waiting for the bus. Without a GPU there are no caps, and `--room` GB of weights stay in memory. Prints a line of
JSON for each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffc.compile.bounded import spare
from diffc.compile.calibration import PipelineRun, calibrate_on_prompts, usual_arguments
from diffc.models.sources.locate import locate
from diffc.quantize.arrivals import THREADS
from diffc.quantize.calibrate import DEFAULT_PROMPTS, calibrate
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import DEFAULT_OPTIONS
from tools.bench.calibration_model import make_pipeline
from tools.bench.calibration_watch import GB, HostPeak, Timed, spent_by, watched


def main() -> None:
    """Make the pipeline and measure each way in a process of its own."""
    options = _options()
    if options.way:
        print(json.dumps(measured(options)))
        return
    make_pipeline(options.model, options.folder / options.model)
    caps = [f"cap {cap:g}" for cap in options.caps] if torch.cuda.is_available() else ["bounded"]
    one = [f"{caps[0]} one by one"] if options.one_by_one else []
    for way in ("whole", *caps, *one):
        command = [sys.executable, "-m", "tools.bench.calibration", *sys.argv[1:], "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout.strip() or json.dumps({"way": way, "exit": done.returncode}), flush=True)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """One calibration; its checkpoint is kept beside the model, to be compared with the whole model's."""
    folder, format = options.folder / options.model, FORMATS[options.format]
    source = locate(str(folder))
    host, ui, begun = HostPeak(), Timed(), time.perf_counter()
    room, cap = int(options.room * GB), None
    if options.way.startswith("cap"):
        cap = float(options.way.split()[1]) * GB
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
        room = spare(int(cap), device_is_gpu=True)
    prompts = tuple(DEFAULT_PROMPTS[i % len(DEFAULT_PROMPTS)] for i in range(options.prompts))
    run = PipelineRun(prompts, options.steps, options.batch, options.pixels, options.pixels, 0, source.dtype)
    streams = watched(options.threads)
    if options.way == "whole":
        checkpoint = _whole(source, run, format, ui)
    else:
        together = 1 if options.way.endswith("one by one") else options.together
        work = options.folder / f"{options.model}-{options.batch}-{options.pixels}-work"
        shutil.rmtree(work / "runs", ignore_errors=True)
        checkpoint = calibrate_on_prompts(
            source, format, DEFAULT_OPTIONS, run, ui, work=work, room=room, together=together
        )
    seconds = time.perf_counter() - begun
    host.ended.set()
    row = {
        "model": options.model,
        "format": options.format,
        "way": options.way,
        "batch": options.batch,
        "first_step_at_s": round(ui.ends[0][1] - begun, 1),
        "step_s": ui.seconds,
        "all_s": round(seconds, 1),
        "host_GB": round(host.peak / GB, 2),
        "encoders": max(0, len(streams) - 1),
        "notes": ui.notes,
    }
    if streams and torch.cuda.is_available():
        row["stream"] = spent_by(streams[-1])
    if torch.cuda.is_available():
        row["card_GB"] = round(torch.cuda.max_memory_allocated() / GB, 2)
        row["card_reserved_GB"] = round(torch.cuda.max_memory_reserved() / GB, 2)
    place = options.folder / f"{options.model}-{options.format}-{options.batch}-whole"
    if options.way == "whole":
        checkpoint.save(place)
        return row
    return row | _compared(checkpoint, Checkpoint.load(place))


def _whole(source: Any, run: PipelineRun, format: Any, ui: Timed) -> Checkpoint:
    """ModelOpt on the whole pipeline: encoders, VAE and backbone on the card, or in memory, at once."""
    family = source.family
    with run.opened(source) as pipe:
        height, width = run.size(pipe, family)
        calibrate(
            pipe,
            family.component,
            format,
            family.unquantized,
            prompts=run.prompts or (),
            steps=run.steps,
            seed=run.seed,
            batch_size=run.batch_size,
            height=height,
            width=width,
            usual=usual_arguments(family, pipe),
            progress=ui.step,
        )
        return Checkpoint.from_backbone(
            getattr(pipe, family.component), family=family.name, format=format.name
        )


def _compared(ours: Checkpoint, whole: Checkpoint) -> dict[str, Any]:
    equal = sum(np.array_equal(ours.amax[name], amax) for name, amax in whole.amax.items())
    worst = max(float(np.abs(ours.amax[name] / amax - 1).max()) for name, amax in whole.amax.items())
    return {"amax": len(whole.amax), "equal": int(equal), "worst_relative": worst}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model of `diffc models real`, or tiny-flux and its like")
    parser.add_argument("format", choices=[name for name, fmt in FORMATS.items() if fmt.algorithm])
    parser.add_argument("--folder", type=Path, required=True, help="for the pipelines")
    parser.add_argument("--caps", type=float, nargs="*", default=[], help="GB of the card")
    parser.add_argument("--room", type=float, default=0.0, help="GB of weights that stay, without a GPU")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--together", type=int, help="batches at once (default: what there is room for)")
    parser.add_argument(
        "--one-by-one", action="store_true", help="the first cap once more, with one batch at once"
    )
    parser.add_argument("--threads", type=int, default=THREADS, help="that fill pinned buffers")
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
