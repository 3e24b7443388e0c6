"""A side in a process of its own, so that its memory can be told from the others' and it rests between its turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy.typing as npt

from diffc.artifact.folder import Artifact
from diffc.commands.bench.sides import Setup, load_side
from diffc.memory import peak_rss
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import family_of_manifest
from diffc.models.sources.backbone import DTYPES
from diffc.models.spec import Shape

MIB = 1 << 20


class SideError(Exception):
    """Why a side cannot be measured."""


@dataclass(frozen=True)
class First:
    """The first call at a shape: its seconds, which include compiling and allocating, and its output as float32."""

    seconds: float
    output: npt.NDArray[Any]


@dataclass(frozen=True)
class Memory:
    """Peak resident memory of the process and the GPU memory that it took, in bytes; None where it is not known."""

    rss: int | None
    gpu: int | None


class Worker:
    """A side in another process. Every method raises SideError when the side fails; close the worker then."""

    def __init__(self, name: str, setup: Setup):
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, setup), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def prepare(self, shape: Shape, seed: int, calls: int) -> First:
        """Draw inputs at `shape`, call once, and `calls` times more to warm up."""
        first: First = self._ask("prepare", shape, seed, calls)
        return first

    def measure(self) -> float:
        """Seconds of one call, the device waited for."""
        return float(self._ask("measure"))

    def memory(self) -> Memory:
        """The peak so far."""
        found: Memory = self._ask("memory")
        return found

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _ask(self, *message: Any) -> Any:
        try:
            self._pipe.send(message)
        except OSError:
            raise SideError(self._ended()) from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise SideError(self._ended()) from None
        if kind == "error":
            raise SideError(value)
        return value

    def _ended(self) -> str:
        self._process.join(10)
        code = self._process.exitcode
        return (
            "its process was killed: not enough memory?" if code == -9 else f"its process ended with {code}"
        )


def _serve(pipe: Connection, name: str, setup: Setup) -> None:
    """What the process runs: load the side, then answer messages until None comes."""
    try:
        side = _Side(name, setup)
        pipe.send(("ready", None))
        while (message := pipe.recv()) is not None:
            pipe.send(("ok", getattr(side, message[0])(*message[1:])))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:  # whatever a compiler or runtime raises is why this side has no figures
        pipe.send(("error", _said(error)))


def _said(error: Exception) -> str:
    """The first two lines of an error that are not empty, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


class Taken:
    """GPU memory that a process takes: how much less is free after its turns than before them. Others rest meanwhile.

    `free` gives the bytes that are free on the device. The CUDA context is not in it: asking makes one.
    """

    def __init__(self, free: Callable[[], int]):
        self._free = free
        self._now = 0
        self.peak = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what the body takes and gives back."""
        before = self._free()
        yield
        self._now += before - self._free()
        self.peak = max(self.peak, self._now)


class _Side:
    def __init__(self, name: str, setup: Setup):
        import torch

        self._cuda = setup.device.startswith("cuda")
        self._setup = setup
        self._taken = Taken(lambda: torch.cuda.mem_get_info()[0] if self._cuda else 0)
        with self._taken.counted():
            self._call: Any = load_side(name, setup)
        self._kwargs: dict[str, Any] = {}

    def prepare(self, shape: Shape, seed: int, calls: int) -> First:
        import torch

        model = Artifact.load(self._setup.artifact).manifest["model"]
        spec, config = family_of_manifest(model), model["config"]
        drawn = random_inputs(spec, config, shape, dtype=DTYPES[self._setup.dtype], seed=seed)
        values = {name: value.to(self._setup.device) for name, value in drawn.items()}
        self._kwargs = forward_kwargs(spec, config, values) | {"return_dict": False}
        with self._taken.counted():
            started = time.perf_counter()
            out: torch.Tensor = self._run()[0]
            seconds = time.perf_counter() - started
            for _ in range(calls):
                self._run()
        return First(seconds, out.float().cpu().numpy())

    def measure(self) -> float:
        with self._taken.counted():
            started = time.perf_counter()
            self._run()
            return time.perf_counter() - started

    def memory(self) -> Memory:
        return Memory(peak_rss(), self._taken.peak if self._cuda else None)

    def _run(self) -> Any:
        import torch

        with torch.inference_mode():
            out = self._call(**self._kwargs)
        if self._cuda:
            torch.cuda.synchronize()
        return out
