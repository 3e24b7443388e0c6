"""What a sweep is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffc.compile.request import CompileRequest
from diffc.sweep.cells import Axes

RAY, PROCESSES = "ray", "processes"


@dataclass(frozen=True)
class Steps:
    """What is done with each finished artifact: the commands of these names.

    `bench`: the sides beside the compiled one, None for no measurement. `evaluate`: the metrics of its pictures against
    torch's, of `prompts`, in `paint_steps` denoising steps.
    """

    validate: bool = False
    bench: tuple[str, ...] | None = None
    repeat: int = 5
    evaluate: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    paint_steps: int = 8

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are asked for."""
        asked = {"validate": self.validate, "bench": self.bench is not None, "evaluate": bool(self.evaluate)}
        return tuple(name for name, wanted in asked.items() if wanted)


@dataclass(frozen=True)
class SweepRequest:
    """A sweep. `base` has the options that all cells share; its model, output, format and so on are those of the cells.

    `folder`: where rows and artifacts go. `artifacts`: the address of a store (file://, s3://) for the artifacts, empty
    for `folder`. `runner`: "ray", or "processes" of this machine. `workers`: compiles at a time on this machine, None
    for what its cores and memory take. `memory`: bytes that they may hold together, None for what is free. `address`:
    of a Ray cluster, whose own resources then count. `tries`: how often a cell is begun whose worker dies. `force`:
    artifacts of other options are replaced. `command`: what repeats the sweep.
    """

    axes: Axes
    base: CompileRequest
    folder: Path
    exclude: tuple[str, ...] = ()
    artifacts: str = ""
    runner: str = RAY
    workers: int | None = None
    memory: int | None = None
    address: str = ""
    tries: int = 3
    steps: Steps = field(default_factory=Steps)
    force: bool = False
    command: tuple[str, ...] = ()
