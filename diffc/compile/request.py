"""What a compile is asked for, and what it returns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.artifact.describe import versions
from diffc.artifact.folder import Artifact
from diffc.backends.sm import parse_sm
from diffc.backends.target import DEFAULT_ENGINE, EngineOptions
from diffc.errors import UsageError
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.paths import (
    AnyPath,
    Converted,
    as_path,
    as_path_or_none,
    as_text,
    as_text_or_none,
    as_texts,
    as_texts_or_none,
)
from diffc.quantize.formats import format_name
from diffc.quantize.options import DEFAULT_OPTIONS, QuantOptions
from passes import Pass, Pipeline
from passes.weights.journal import code_version

if TYPE_CHECKING:
    from diffc.backends.tensorrt.build import EngineReport
    from diffc.validate.reports import ShapeReport
    from passes.pipeline import PassRecord

DTYPES = ("float32", "float16", "bfloat16")
"""The compute types of a compiled backbone."""
DTYPE_ALIASES: Mapping[str, str] = {
    "float": "float32",
    "fp32": "float32",
    "single": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""Other names of types: those of ModelOpt's scripts (Half, BFloat16, Float) and short ones; capitals do not matter."""


def dtype_name(name: str) -> str:
    """The type that `name` means, "torch." before it or not; `name` itself where it is none."""
    spelled = name.lower().removeprefix("torch.")
    spelled = DTYPE_ALIASES.get(spelled, spelled)
    return spelled if spelled in ("auto", *DTYPES) else name


def _as_sms(value: int | str | Iterable[int | str]) -> tuple[int, ...]:
    """Compute capabilities: 89, "8.9" or "sm_89", one or several."""
    values = (value,) if isinstance(value, int | str) else value
    return tuple(one if isinstance(one, int) else parse_sm(one) for one in values)


@dataclass(frozen=True)
class CompileRequest:
    """Everything that a compile depends on; the defaults are those of the command line.

    Paths may be text or os.PathLike, `targets` and `sms` a single one; formats and types may have ModelOpt's names.
    `model`: an embedded model, a pipeline or backbone folder, an id of the Hugging Face hub, or an .onnx file; `hub`
    says which of its files are read. `output`: the folder to write.
    `format` "auto" keeps what the model's file holds quantized, and is "none" for any other.
    `sms`: compute capabilities to build engines for, such as 89. `dtype` "auto" is the type in which the backbone's
    weights are stored. `profile`: the text of --profile. `from_checkpoint`: a calibration to take instead of a new one.
    `save_checkpoint`: a folder to save the calibration in as well, as soon as it is finished.
    `prompts`: None for diffc's own. `calibrate` "synthetic" runs random inputs layer by layer instead of the pipeline
    on prompts. `calib_size`: how many prompts to use, None for all; more than there are repeat with other noise.
    `component_dtypes`: (component, type) pairs for calibration on a GPU; other components have the compute type.
    `steps` and `guidance`: denoising steps and guidance scale of a calibration prompt, None for what the pipeline is
    meant for (`diffc.models.sampling`). `negative_prompt`: empty for none. `batch_size`: calibration prompts at a time.
    `image_size`: pixels of the calibration images, None for the model's own; `height` and `width` take its place where
    they are given. `seed`: of calibration noise and validation inputs.
    `loras`: LoRA files to fuse into the weights; `lora_partial`: their keys that fit no layer are left out.
    `lora_slots`: the highest rank of LoRAs that the compiled model takes when it runs, 0 for none.
    `cache_plan`: a preset of `diffc.cache` or a plan file, empty for none; `cache_layout`: one of
    `diffc.cache.layout.LAYOUTS`. `passes`: the text of --passes, empty for none; they run after the canonical ones and
    before those of each target. `pipeline`: the pipeline around a model that is a backbone alone or one file.
    `force`: replace an artifact at `output`. `dump`: a folder for the graph after each pass.
    """

    model: Converted[AnyPath, str] = Converted(as_text)
    output: Converted[AnyPath, Path] = Converted(as_path)
    format: Converted[str, str] = Converted(format_name, "auto")
    targets: Converted[str | Iterable[str], tuple[str, ...]] = Converted(as_texts, ("ort",))
    sms: Converted[int | str | Iterable[int | str], tuple[int, ...]] = Converted(_as_sms, ())
    dtype: Converted[str, str] = Converted(dtype_name, "auto")
    profile: str = ""
    from_checkpoint: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    save_checkpoint: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    options: QuantOptions = DEFAULT_OPTIONS
    prompts: Converted[str | Iterable[str] | None, tuple[str, ...] | None] = Converted(as_texts_or_none, None)
    calib_size: int | None = None
    calibrate: str = "pipeline"
    component_dtypes: tuple[tuple[str, str], ...] = ()
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    batch_size: int = 4
    image_size: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    loras: tuple[LoraSpec, ...] = ()
    lora_partial: bool = False
    lora_slots: int = 0
    cache_plan: Converted[AnyPath, str] = Converted(as_text, "")
    cache_layout: str = "full+reduced"
    passes: str = ""
    engine: EngineOptions = DEFAULT_ENGINE
    skip_validation: bool = False
    force: bool = False
    dump: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    hub: HubOptions = DEFAULT_HUB
    pipeline: Converted[AnyPath | None, str | None] = Converted(as_text_or_none, None)

    @property
    def own_passes(self) -> tuple[Pass, ...]:
        """The passes of --passes. Raises PassError that lists the known ones."""
        return Pipeline.parse(self.passes).passes if self.passes else ()

    @property
    def cache_files(self) -> tuple[Path, ...]:
        """The file of the cache plan; empty for a preset."""
        return (Path(self.cache_plan),) if self.cache_plan.endswith((".json", ".yaml", ".yml")) else ()


@dataclass(frozen=True)
class CompileResult:
    """The artifact, and what each stage reports beyond the manifest."""

    artifact: Artifact
    passes: Sequence[PassRecord]
    validation: Sequence[ShapeReport]
    engines: Sequence[EngineReport] = field(default=())


def parse_component_dtype(text: str) -> tuple[str, str]:
    """(component, type) of "vae:float32"; types may have ModelOpt's names. Raises UsageError for another form."""
    name, colon, dtype = text.partition(":")
    if not (name and colon and dtype):
        raise UsageError(f"--component-dtype is {text!r}", fix="write COMPONENT:TYPE, such as vae:float32")
    return name, dtype_name(dtype)


def request_key(request: CompileRequest, files: Iterable[Path], weights: str = "") -> str:
    """A hash of `request`, of `files` and of everything else that decides the result.

    A file, or every file of a folder, counts with its path, size and time of change. `weights` is the fingerprint of
    the model's weights.
    """
    import torch

    # Where the result goes, and copies of graphs on the way, change nothing of it.
    hub = replace(request.hub, token=None)
    wanted = asdict(replace(request, output=Path(), force=False, dump=None, save_checkpoint=None, hub=hub))
    checkpoint = [request.from_checkpoint] if request.from_checkpoint else []
    content = {
        "request": wanted,
        "files": list(_stats((*files, *checkpoint))),
        "weights": weights,
        "code": code_of_diffc(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _stats(places: Iterable[Path]) -> Iterator[list[Any]]:
    for place in places:
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        for file in files:
            stat = file.stat() if file.exists() else None  # what is missing is refused where it is read
            yield [str(file.resolve()), *((stat.st_size, stat.st_mtime_ns) if stat else ())]


@lru_cache(maxsize=1)
def code_of_diffc() -> str:
    """A hash of all code of diffc and passes: a compile never goes on with what other code has left."""
    digest = hashlib.sha256(code_version().encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
