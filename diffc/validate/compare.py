"""Comparing outputs through Polygraphy: relative L2 error in float64. Every way to be wrong is a failure."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diffc.errors import DiffcError
from passes.files.atomic import write_text

if TYPE_CHECKING:
    from polygraphy.comparator import RunResults

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class OutputComparison:
    """One output against its reference. The figures are None where they cannot be computed.

    `rel_l2` is ||reference - result|| / ||reference||, `max_abs` the largest absolute difference, `cosine`
    that of the angle between the two as vectors, all in float64. `reason` is empty when it passed.
    """

    name: str
    passed: bool
    tolerance: float
    rel_l2: float | None = None
    max_abs: float | None = None
    cosine: float | None = None
    shape: tuple[int, ...] = ()
    reason: str = ""

    def __bool__(self) -> bool:
        """Polygraphy counts a result as matched when it is true."""
        return self.passed


def compare(reference: Outputs, result: Outputs, max_rel_l2: float) -> list[OutputComparison]:
    """Compare outputs of the same names; one row for each name on either side, in the reference's order.

    A row fails beyond `max_rel_l2`, and for NaN or infinity, another shape, a missing or additional output,
    and a reference that is zero or empty, since everything agrees with that. Raises DiffcError when there is
    nothing to compare, and for a tolerance that would accept anything.
    """
    from polygraphy.comparator import Comparator

    if not reference:
        raise DiffcError(
            "the reference has no outputs: there is nothing to compare",
            fix="give a reference of the same model",
        )
    if not 0 < max_rel_l2 < 1:
        raise DiffcError(
            f"a relative L2 tolerance lies between 0 and 1; {max_rel_l2} was given",
            fix="give a number between 0 and 1",
        )

    def compare_outputs(first: Outputs, second: Outputs) -> dict[str, OutputComparison]:
        names = dict.fromkeys([*first.keys(), *second.keys()])
        return {name: _compare_output(name, first, second, max_rel_l2) for name in names}

    with _quiet():
        runs = [run_results(reference, "reference"), run_results(result, "result")]
        accuracy = Comparator.compare_accuracy(runs, compare_func=compare_outputs)
    return list(accuracy[0]["reference", "result"][0].values())


def _compare_output(name: str, first: Outputs, second: Outputs, tolerance: float) -> OutputComparison:
    if name not in second:
        return OutputComparison(name, False, tolerance, reason="missing from the result")
    if name not in first:
        return OutputComparison(name, False, tolerance, reason="not an output of the reference")
    a, b = first[name].astype(np.float64), second[name].astype(np.float64)
    shape = tuple(b.shape)
    if a.shape != b.shape:
        reason = f"shape {list(b.shape)} instead of {list(a.shape)}"
        return OutputComparison(name, False, tolerance, shape=shape, reason=reason)
    reason = _unusable("reference", a) or _unusable("result", b)
    norm = float(np.linalg.norm(a))
    if not reason and norm == 0:
        reason = "the reference is zero everywhere, or empty: any comparison with it is void"
    if reason:
        return OutputComparison(name, False, tolerance, shape=shape, reason=reason)
    return _measure(name, a, b, tolerance)


def _unusable(which: str, array: Array) -> str:
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    return f"{bad} of {array.size} values of the {which} are NaN or infinite" if bad else ""


def _measure(name: str, a: Array, b: Array, tolerance: float) -> OutputComparison:
    difference, norm_a, norm_b = a - b, float(np.linalg.norm(a)), float(np.linalg.norm(b))
    rel_l2 = float(np.linalg.norm(difference)) / norm_a
    cosine = float(np.vdot(a, b)) / (norm_a * norm_b) if norm_b else 0.0
    passed = rel_l2 <= tolerance
    reason = "" if passed else f"relative L2 error {rel_l2:.3g} is over the tolerance {tolerance:.3g}"
    max_abs = float(np.max(np.abs(difference)))
    return OutputComparison(name, passed, tolerance, rel_l2, max_abs, cosine, tuple(b.shape), reason)


def run_results(outputs: Outputs, runner: str) -> RunResults:
    """Polygraphy's RunResults of one run. Types that numpy lacks (bfloat16, float8) become float32."""
    from polygraphy.comparator import RunResults

    results = RunResults()
    results.add([_plain(outputs)], runner_name=runner)
    return results


def save_outputs(outputs: Outputs, runner: str, path: Path) -> None:
    """Write outputs for `polygraphy run --load-outputs`."""
    with _quiet():
        _write(path, run_results(outputs, runner).to_json())


def save_inputs(feed: Outputs, path: Path) -> None:
    """Write inputs for `polygraphy run --load-inputs`."""
    from polygraphy.json import to_json

    with _quiet():
        _write(path, to_json([_plain(feed)]))


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays that `save_inputs` or `save_outputs` wrote. Raises DiffcError for a file of another kind."""
    from polygraphy.json import load_json

    try:
        with _quiet():
            held = load_json(str(path))
        first = held[0]
        values = first[1][0] if isinstance(first, tuple) else first
        return {name: np.asarray(values[name]) for name in values}
    except Exception as error:  # of Polygraphy, json and base64: whatever a damaged file raises
        raise DiffcError(f"{path} holds no arrays: {error}", fix="compile again") from error


def save_json(rows: Sequence[OutputComparison], path: Path) -> None:
    """Write the rows as a JSON list of objects, None for figures that do not exist."""
    _write(path, json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False) + "\n")


def _plain(arrays: Outputs) -> dict[str, Array]:
    """Arrays in types of numpy's own; the others become float32, which holds their values exactly."""
    return {n: a if a.dtype.isbuiltin else a.astype(np.float32) for n, a in arrays.items()}


def _write(path: Path, text: str) -> None:
    write_text(path, text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Polygraphy logs to stdout, and what numpy warns of when it takes means of NaN for that."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
