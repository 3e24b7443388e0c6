"""The check of a graph from elsewhere: every pass in numbers, as far as ONNX Runtime's CPU provider runs it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from diffc.apart import FORKS, Ended, run_apart
from diffc.artifact.describe import NOT_COMPARED
from diffc.backends.onnx_graph import element_types
from diffc.validate.compare import compare
from diffc.validate.fitting_sizes import FittingSizes
from diffc.validate.float32 import cpu_session, emulated, feed, float32_copy, unrounded_copy
from diffc.validate.passes import NUMERIC_LIMIT, check_quantized_weights
from diffc.validate.tolerances import PASS_REL_L2
from diffc.validate.trial_inputs import Sizes, TrialInputs, open_dimensions
from passes import Pass, PassCheckError, PassError, Pipeline
from passes.canonical.fold_constants import FoldConstants
from passes.canonical.split_sequences import SplitSequences
from passes.graph.check import check_structure
from passes.graph.types import FLOATS
from passes.importing.rewrite_opset import RewriteOpset
from passes.storage import initializers, weight_bytes
from passes.weights.recipe import Recipe

_RAISE = Pipeline([RewriteOpset()])
"""The functions that stand for TensorRT's operators in ONNX Runtime need opset 21."""
_FOLD = Pipeline([SplitSequences(), FoldConstants()])
"""Shapes that exporters compute from shapes are constants only then."""
_SECONDS = 10.0
"""How long sizes are looked for at most: a graph of 160 nodes and more; a small one is tried in no time."""
_NO_KERNEL = re.compile(r"Could not find an implementation for (\w+)\((\d+)\)")
Outputs = dict[str, npt.NDArray[Any]]


@dataclass
class ImportCheck:
    """The runner's check of a graph that another tool wrote, also while it is still becoming valid.

    Exports often are no valid ONNX: `strict` says from which pass on the graph must be. Outputs are compared
    across every pass that starts from a graph which ONNX Runtime can run and which says what it means (see
    `marks`); the line says so where it does not, and why. Weights over `NUMERIC_LIMIT` are not run.

    `interface` is the model whose inputs are drawn, None for the first that is checked.
    `given` are sizes of the dynamic dimensions that the user named. A graph that runs nowhere is never refused.
    """

    given: Sequence[Sizes] = ()
    numbers: bool = True
    strict: bool = False
    seed: int = 0
    interface: onnx.ModelProto | None = None
    _trial: TrialInputs | None = None
    _ran: bool = False
    _stopped: str = ""
    _invalid: bool = False
    _cache: list[tuple[onnx.ModelProto, bool, list[Outputs] | str]] = field(default_factory=list)

    def __call__(self, before: onnx.ModelProto | None, after: onnx.ModelProto, step: Pass | None) -> str:
        """One line on what was checked. Raises PassCheckError."""
        self._trial = self._trial or TrialInputs(self.interface or after, self.given, self.seed)
        line = self._structure(before, after, step)
        if not self.numbers or before is None or step is None:
            return line
        if max(weight_bytes(before), weight_bytes(after)) > NUMERIC_LIMIT:
            return f"{line}; {NOT_COMPARED} (weights over {NUMERIC_LIMIT >> 20} MiB)"
        if self.strict and (count := check_quantized_weights(before, after)):
            line += f"; {count} quantized weights within half a step"
        return f"{line}; {self._compare(before, after, step)}"

    def reason(self, sizes: Sizes) -> str:
        """Why the graph did not run at these of the `given` sizes, though it did at others; empty where it did.

        Sizes that leave a dimension open tell nothing: it was run at a size that nobody asked for.
        """
        if self._trial is None or not self._trial.sizes or open_dimensions(self._trial.interface, sizes):
            return ""
        return next((why for tried, why in self._trial.failed if tried.items() >= sizes.items()), "")

    def _structure(self, before: onnx.ModelProto | None, after: onnx.ModelProto, step: Pass | None) -> str:
        try:
            return check_structure(before, after, step)
        except PassError as error:
            if before is None:
                self._invalid = True
            if self.strict and self._invalid:  # it came so, and no pass has put it right
                what = str(error).removeprefix("the model is not valid ONNX: ").partition(". Fix: ")[0]
                raise PassError(f"the model is not valid ONNX: {what}. Fix: export it again") from error
            if self.strict:
                raise
            return "not valid yet"

    def _compare(self, before: onnx.ModelProto, after: onnx.ModelProto, step: Pass) -> str:
        rounded = any(node.op_type in _ALWAYS_ROUNDED for node in before.graph.node)
        old = self._outputs(before, rounded)
        if isinstance(old, str):
            return f"{NOT_COMPARED}: before it, {old}"
        if wild := next((n for values in old for n, v in values.items() if not _finite(v)), None):
            return f"{NOT_COMPARED}: before it, output {wild!r} is not finite on random inputs"
        new = self._outputs(after, rounded)
        if isinstance(new, str):
            raise PassCheckError(f"pass {step.name!r}: ONNX Runtime ran the graph before it; after it, {new}")
        limit = step.tolerance + PASS_REL_L2 + _folding(before, step)
        rows = [row for a, b in zip(old, new, strict=True) for row in compare(a, b, limit)]
        for row in (row for row in rows if not row.passed):
            raise PassCheckError(f"pass {step.name!r} changed output {row.name!r}: {row.reason}")
        return f"outputs within {max(row.rel_l2 or 0.0 for row in rows):.1e} (limit {limit:.1e})"

    def _outputs(self, model: onnx.ModelProto, rounded: bool) -> list[Outputs] | str:
        """Outputs of the float32 copy for all inputs, unrounded unless `rounded`; or why there are none."""
        for known, how, outputs in self._cache:
            if known is model and how == rounded:
                return outputs
        found = marks(model)
        made: list[Outputs] | str
        if found:
            made = f"{len(found)} nodes only marked what should be quantized, such as {found[0]!r}"
        else:
            made = self._run(model, rounded)
        self._cache = [*self._cache[-1:], (model, rounded, made)]
        return made

    def _run(self, model: onnx.ModelProto, rounded: bool) -> list[Outputs] | str:
        """The outputs, or why there are none; a graph runs in a process apart, for it may never end, or crash.

        Where such a process starts anew, which takes seconds, that is the first graph alone.
        """
        assert self._trial is not None
        if self._stopped or (self._ran and not FORKS) or not can_run_apart(model):
            return self._stopped or _run(self._trial, model, rounded)[0]
        size = model.ByteSize() + weight_bytes(model)
        seconds = 1.5 + _search_seconds(model) + len(model.graph.node) / 100 + size / 100_000
        memory = 40 * size + ((256 << 20) if size < _TINY else (2 << 30))
        try:
            found: list[Outputs] | str
            found, self._trial = run_apart(_run, self._trial, model, rounded, seconds=seconds, memory=memory)
        except Ended as error:
            self._stopped = f"it did not run (ONNX Runtime was stopped: {error.reason})"
            return self._stopped
        self._ran = not isinstance(found, str)
        return found


def _run(
    trial: TrialInputs, model: onnx.ModelProto, rounded: bool
) -> tuple[list[Outputs] | str, TrialInputs]:
    """Outputs of the float32 copy for all inputs of `trial`, or why there are none; and `trial` after that."""
    try:
        raised = _RAISE.run(model, check=lambda before, after, step: "").model
        copy = float32_copy(raised) if rounded else unrounded_copy(raised)
        with cpu_session(copy) as session:
            return trial.run(lambda values: session.run(feed(copy, values)), _search(trial, copy)), trial
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's are of many classes; the caller decides what it means
        return _reason(error, model), trial


def _search(trial: TrialInputs, copy: onnx.ModelProto) -> Iterator[Sizes]:
    """Sizes that the constants of the graph leave, where ONNX can follow it; looked for in few graphs of an import."""
    if trial.searches:
        folded = _FOLD.run(emulated(copy), check=lambda before, after, step: "").model
        fitting = FittingSizes(folded)
        trial.searches -= fitting.tells
        yield from fitting.search(_search_seconds(copy))


def _search_seconds(model: onnx.ModelProto) -> float:
    return min(_SECONDS, 2 + len(model.graph.node) / 20)


_TINY = 1 << 18
"""Bytes of a model, weights and all, that needs little memory whatever its inputs are."""


def can_run_apart(model: onnx.ModelProto) -> bool:
    """Whether another process finds all weights: those that this one has read stay in it where it cannot fork."""
    recipes = (Recipe.of_tensor(tensor) for tensor in initializers(model))
    return FORKS or all(source.kind != "memory" for r in recipes if r is not None for source in r.sources)


def _finite(values: npt.NDArray[Any]) -> bool:
    return bool(np.isfinite(values).all()) if values.dtype.kind == "f" else True


def _folding(model: onnx.ModelProto, step: Pass) -> float:
    """What folding constants may change: their sums are rounded to the stored type, which the float32 copy is not."""
    types = element_types(model)
    if step.name != FoldConstants.name:
        return 0.0
    return max((limit for kind, limit in _FOLDED.items() if kind in types), default=0.0)


_FOLDED = {onnx.TensorProto.BFLOAT16: 1e-3, onnx.TensorProto.FLOAT16: 1e-4}
"""Some constants rounded by 2^-9 or 2^-12 each; 5e-5 was measured for FLUX in bfloat16."""


def _reason(error: Exception, model: onnx.ModelProto) -> str:
    """Why a graph did not run, in one line."""
    missing = _NO_KERNEL.search(str(error))
    if missing is not None:
        domain = next((n.domain for n in model.graph.node if n.op_type == missing[1]), "")
        name = f"{domain}::{missing[1]}" if domain else f"{missing[1]} of opset {missing[2]}"
        return f"it did not run (ONNX Runtime's CPU provider has no kernel for {name})"
    lines = str(error).splitlines() or [type(error).__name__]
    return f"it did not run ({lines[0].strip()[:240]})"


def marks(model: onnx.ModelProto) -> list[str]:
    """Names of nodes that stand for a quantizer which the exporter should have put there.

    They are dequantizers of what was never quantized: a float weight (INT4), or any float tensor (MXFP8).
    """
    quantized = {t.name for t in model.graph.initializer if t.data_type not in FLOATS}
    quantized |= {name for n in model.graph.node if n.op_type.endswith(_QUANTIZERS) for name in n.output}
    moved = {name: n.input[0] for n in model.graph.node if n.op_type in _MOVES for name in n.output}

    def source(name: str) -> str:
        while name in moved:
            name = moved[name]
        return name

    return [
        node.name
        for node in model.graph.node
        if node.op_type.endswith("DequantizeLinear") and source(node.input[0]) not in quantized
    ]


# Quantizers that drop-rounding does not know: graphs that have them are compared with all their roundings.
_ALWAYS_ROUNDED = ("TRT_FP8QuantizeLinear", "TRT_INT4QuantizeLinear", "TRT_FP4QDQ")
_QUANTIZERS = ("QuantizeLinear", "DynamicQuantize", "Constant")
_MOVES = frozenset({"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
