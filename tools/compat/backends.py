"""What `tools.compat.run` asks of each runtime, inside its child process: parse and build, or load, run and compare."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.errors import DiffcError
from tools.compat.net import random_array

Said = tuple[str, str]
"""A column and its verdict ("ok", or which stage failed and why), or the name of a figure and its value."""
Ranges = Mapping[str, Mapping[str, Sequence[int]]]

_WRAPPING = (
    (r"^IBuilder::\w+: Error Code \d+: (Internal Error )?", ""),
    (r"^ITensor::\w+: Error Code \d+: (API Usage Error )?", ""),
    (r"^Myelin \(\[[^\]]*\] ", ""),
    (r"^(MyelinCheckException: )?\w+\.cpp:\d+: CHECK\(.*?\) failed\. ?(?! *\(?In \w+ at )", ""),
    (r"^API Usage Error ", ""),
    (r"^\((?=[TQ])", ""),
    (r"\.? ?\(?In \w+ at /_src/.*$", ""),
    (r" *\(See https://.*$", ""),
    (r"^Failed to import initializer: .*", "Failed to import initializer"),
    (r"(operation: )\s*\d+: (\w+):.*$", r"\1\2"),
    (r"^\(?[A-Za-z0-9_]+_\d+:? ", ""),
    (r"\b([A-Z]\w*[A-Za-z])_\d+\b", r"\1"),
    (r"^Cannot compile for target\(s\) sm\d+, because the model contains ", ""),
    (r"^ONNX Runtime [a-z ]+: ", ""),
    (r"^\[ONNXRuntimeError\] : \d+ : ", ""),
    (r" node with name '[^']*'.*$", ""),
    (r"NOT_IMPLEMENTED : Failed to find kernel for (\S+) .*$", r"no kernel for \1"),
    (r"NOT_IMPLEMENTED : Could not find an implementation for ", "no kernel for "),
    (r"FAIL : Fatal error: (\S+)\(-1\) is not", r"\1 is not"),
    (r",? ?[iI]n [nN]ode:? ?\([^)]*\)", ""),
    (r" In Node, .* , Error ", " "),
    (r"Load model failed:? ?|Status Message: ", ""),
    (r"\(Node:\([^)]*\)\) ?|\(node '[^']*'\)", ""),
    (r"Name:'[^']*' ?", ""),
    (r"/\S+/(?=\w+\.(cc|cpp|h):\d+)", ""),
    (r"\w+\.h:\d+ .* was false\. ", ""),
    (r"\w+\.h:\d+ .*\) (?=ONNX Runtime )", ""),
)  # what says where in the compiler a reason was found, or which node of the probe it was
_NOISE = r"cudaError 35|^---|^Invalid Node - |^$"


def reason(text: str, otherwise: str = "no reason given") -> str:
    """The first line of a message that says something, without what differs from build to build."""
    said = [line.strip() for line in text.splitlines() if not re.search(_NOISE, line.strip())]
    line = said[0] if said and said[0] != "false" else otherwise
    for pattern, plain in _WRAPPING:
        line = re.sub(pattern, plain, line)
    line = re.sub(r"(datatypes: )(.*)", lambda m: m[1] + ", ".join(sorted(m[2].split(", "))), line)
    line = line.strip(" .")
    if line.count(")") > line.count("("):
        line = line.removesuffix(")")
    return line.strip(" .")[:200] or otherwise


def probe_engine(
    module: str, columns: Sequence[str], model: bytes, ranges: Ranges, weights: int
) -> Iterator[Said]:
    """Parse and build for each column; then the engine's bits per weight where `weights` counts some."""
    trt = importlib.import_module(module)
    logger, bits = _logger(trt), None
    for column in columns:
        logger.errors.clear()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model):
            error = parser.get_error(0)
            yield column, f"parser: {reason(error.desc(), error.code().name)}"
            continue
        engine = builder.build_serialized_network(network, _config(trt, builder, column, ranges))
        if engine is None:
            yield column, f"builder: {reason(chr(10).join(logger.errors))}"
            continue
        bits = 8 * engine.nbytes / weights if weights else None
        yield column, "ok"
    if bits is not None:
        yield "bits", f"{bits:.1f}"


def _config(trt: Any, builder: Any, column: str, ranges: Ranges) -> Any:
    config = builder.create_builder_config()
    if column.startswith("sm"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, column.upper()), 0)
    if ranges:
        profile = builder.create_optimization_profile()
        for name, sizes in ranges.items():
            profile.set_shape(name, sizes["min"], sizes["opt"], sizes["max"])
        config.add_optimization_profile(profile)
    return config


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is known only now
        """Keeps the errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()


def probe_session(columns: Sequence[str], model: bytes, ranges: Ranges) -> Iterator[Said]:
    """Load and run in diffc's session ("cpu", "cpu-exact"), load without any option ("cpu-plain"), and compare."""
    feed = _feed(onnx.load_from_string(model), ranges)
    for column in columns:
        short, _, mode = column.partition("-")
        provider = _provider(short)
        if mode == "plain":
            yield column, _load_plain(model, provider)
            continue
        verdict, results = _run(model, provider, mode == "exact", feed)
        yield column, verdict
        if mode == "exact" and results is not None:
            found = _compare(model, feed, results)
            figure = "distance" if short == "cpu" else f"{short} distance"
            yield from [] if found is None else [(figure, found)]


def _provider(short: str) -> str:
    import onnxruntime

    known = {p.removesuffix("ExecutionProvider").lower(): p for p in onnxruntime.get_available_providers()}
    return str(known[short])


def _feed(model: onnx.ModelProto, ranges: Ranges) -> dict[str, Any]:
    rng, feed = np.random.default_rng(len(model.graph.node)), {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = ranges[value.name]["opt"] if value.name in ranges else [d.dim_value for d in kind.shape.dim]
        feed[value.name] = random_array(rng, kind.elem_type, shape)
    return feed


def _load_plain(model: bytes, provider: str) -> str:
    import onnxruntime

    try:
        onnxruntime.InferenceSession(model, providers=[provider])
    except Exception as error:  # ONNX Runtime has one unrelated exception class per status code
        return f"load: {reason(str(error))}"
    return "ok"


def _run(model: bytes, provider: str, exact: bool, feed: Mapping[str, Any]) -> tuple[str, Any]:
    try:
        session = OrtSession(model, [provider], exact=exact)
    except DiffcError as error:
        return f"load: {reason(str(error))}", None
    try:
        return "ok", session.run(feed)
    except DiffcError as error:
        return f"run: {reason(str(error))}", None


def _compare(model: bytes, feed: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    """The relative L2 distance to onnx.reference, as the power of ten above it; None where that cannot run."""
    try:
        wanted = ReferenceEvaluator(onnx.load_from_string(model)).run(None, dict(feed))
    except Exception:  # an operator or type that the evaluator lacks: no reference
        return None
    return _power(max(distance(np.asarray(w), results[n]) for w, n in zip(wanted, results, strict=True)))


def _power(value: float) -> str:
    if value == 0 or not np.isfinite(value):
        return f"{value:.0f}"
    return f"1e{int(np.ceil(np.log10(value))):+03d}"


def distance(wanted: Any, got: Any) -> float:
    """The relative L2 distance of two results; infinite where shape or finiteness differs."""
    if wanted.shape != got.shape:
        return float("inf")
    a, b = wanted.astype(np.float64), got.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    a, b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0)
    size = float(np.linalg.norm(a))
    return float(np.linalg.norm(a - b)) / size if size else float(np.linalg.norm(b))
