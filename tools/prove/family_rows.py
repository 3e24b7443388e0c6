"""One compile of one pipeline in one format, and what came of it: the rows of the table in docs/families.md."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diffc.artifact.folder import Artifact
from diffc.commands.generate import GenerateRequest, generate
from diffc.compile.spine import CompileRequest, CompileResult, compile_model
from diffc.errors import DiffcError
from diffc.models.family import Family
from diffc.models.registry import family_of_manifest
from diffc.models.sources.locate import locate
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions
from passes import PassError
from tools.prove.family_models import MODELS, make

MHA = "+mha"
"""Behind the name of a format: attention in FP8 as well."""
PROMPTS = ("a red fox asleep in fresh snow", "a wooden sign that reads OPEN")
_SHORT = {"float32, activations not rounded": "smooth"}


@dataclass(frozen=True)
class Row:
    """What was asked for, and what came of it.

    `errors`: the largest relative L2 error of each arithmetic. `engines`: names and sizes of those that were built.
    `psnr`: dB of pictures of the pipeline with the compiled backbone against those of torch; None where none were
    made. `result`: "ok", or what diffc raised.
    """

    model: str
    backbone: str
    format: str
    errors: dict[str, float]
    engines: tuple[str, ...]
    psnr: float | None
    seconds: float
    result: str

    @property
    def key(self) -> tuple[str, str]:
        """What is asked for once."""
        return self.model, self.format


def measured(
    model: str, format: str, dtype: str, folder: Path, targets: Sequence[str], sms: Sequence[int]
) -> Row:
    """Compile `model`, a name of MODELS or a pipeline folder, and paint with the result; what diffc raises is told."""
    started = time.monotonic()
    place = make(model, folder) if model in MODELS else Path(model)
    output = folder / f"{place.name}-{format}"
    psnr: float | None = None
    errors, engines, result = dict[str, float](), tuple[str, ...](), "ok"
    try:
        found = compile_model(_request(place, output, format, dtype, targets, sms))
        errors, engines = _errors(found), _engines(found)
        psnr = _painted(output) if "ort" in targets else None
    except (DiffcError, PassError) as error:
        result = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    except Exception as error:  # a fault of ours is a row as well, and no end of the table
        result = f"fault: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    seconds = time.monotonic() - started
    return Row(place.name, backbone_of(place), format, errors, engines, psnr, seconds, result)


def backbone_of(place: Path) -> str:
    """The class of the backbone of the pipeline in `place`."""
    index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
    return str(next(index[name][1] for name in ("transformer", "unet", "prior", "decoder") if name in index))


def _request(
    place: Path, output: Path, format: str, dtype: str, targets: Sequence[str], sms: Sequence[int]
) -> CompileRequest:
    fmt = FORMATS[format.removesuffix(MHA)]
    return CompileRequest(
        str(place),
        output,
        fmt.name,
        tuple(targets),
        tuple(sm for sm in sms if sm >= fmt.min_sm) if "trt-rtx" in targets else (),
        dtype=dtype,
        force=True,
        steps=2,
        prompts=PROMPTS,
        image_size=64 if fmt.algorithm else None,
        options=QuantOptions(mha=format.endswith(MHA)),
        profile=_profile(locate(str(place)).family),
    )


def _profile(family: Family) -> str:
    """Small images and few frames, so that validation at shapes of the engine takes seconds."""
    step = math.lcm(32, family.pixel_multiple({}))
    axes = {
        "batch": (1, 2, 4),
        "height": (2 * step, 4 * step, 8 * step),
        "width": (2 * step, 4 * step, 8 * step),
    }
    axes["text"] = (8, 32, 64)
    if family.frames is not None:
        axes["frames"] = (family.video_frames(1), family.video_frames(2), family.video_frames(4))
    return ",".join(f"{name}={':'.join(map(str, sizes))}" for name, sizes in axes.items())


def _painted(output: Path) -> float:
    """PSNR in dB of what the pipeline paints with the compiled backbone in ONNX Runtime, against torch."""
    family = family_of_manifest(Artifact.load(output).manifest["model"])
    step = math.lcm(32, family.pixel_multiple({}))
    request = GenerateRequest(
        output,
        output / "painted.png",
        PROMPTS[0],
        compare=("torch",),
        steps=2,
        height=2 * step,
        width=3 * step,
        frames=family.video_frames(1),
        target="ort",
        warm_up=False,
    )
    return float(generate(request)[-1].psnr or 0.0)


def _errors(result: CompileResult) -> dict[str, float]:
    """The largest error of each arithmetic, over shapes and outputs."""
    found: dict[str, float] = {}
    for report in result.validation:
        worst = max(row.rel_l2 or 0.0 for row in report.rows)
        name = _SHORT.get(report.arithmetic, report.arithmetic)
        found[name] = max(found.get(name, 0.0), worst)
    return found


def _engines(result: CompileResult) -> tuple[str, ...]:
    return tuple(f"SM{e.sms[0]} {e.nbytes / 1e6:.1f} MB" for e in result.engines)


def load_rows(file: Path) -> dict[tuple[str, str], Row]:
    """The rows of a file that `save_rows` wrote, by model and format; none where there is no file."""
    if not file.is_file():
        return {}
    rows = [
        Row(**{**r, "engines": tuple(r["engines"])}) for r in json.loads(file.read_text(encoding="utf-8"))
    ]
    return {row.key: row for row in rows}


def save_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON."""
    text = json.dumps([asdict(row) for row in rows], indent=1)
    file.write_text(text + "\n", encoding="utf-8", newline="\n")


def merged(old: Row | None, new: Row) -> Row:
    """`new`, with the engines of an earlier run without fault where it has none of its own."""
    if old is None or new.engines or new.result != "ok" or old.result != "ok":
        return new
    return Row(**{**vars(new), "engines": old.engines})
