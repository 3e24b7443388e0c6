"""What a report is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.paths import AnyPath, Converted, as_path, as_path_or_none, as_text_or_none, as_texts


@dataclass(frozen=True)
class ReportRequest:
    """What to show, and where to write it.

    `what`: an artifact, or the folder of a sweep. `against`: another artifact to stand beside the first. `paint`:
    prompts whose pictures are painted, beside torch. `layers`: the error of each layer in each step is measured while
    the first of the prompts is painted, or one of diffc's own. `steps`, `seed`, `size` (pixels) and `pipeline` are
    those of `diffc generate`. `pictures`: the JSON of `diffc evaluate`, with pictures that are there already.
    `bench` and `scores`: what `diffc bench --json` and `diffc evaluate --json` wrote.
    """

    what: Converted[AnyPath, Path] = Converted(as_path)
    output: Converted[AnyPath, Path] = Converted(as_path)
    against: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    paint: Converted[str | Iterable[str], tuple[str, ...]] = Converted(as_texts, ())
    layers: bool = False
    steps: int = 20
    seed: int = 0
    size: int | None = None
    pipeline: Converted[AnyPath | None, str | None] = Converted(as_text_or_none, None)
    pictures: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    bench: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    scores: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    hub: HubOptions = DEFAULT_HUB
