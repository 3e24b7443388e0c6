"""What `compat_run` asks of each runtime, inside its child process: parse and build, or load, run and compare."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from compat_net import random_array
from onnx.reference import ReferenceEvaluator

from diffc.backends.ort import OrtSession
from diffc.errors import DiffcError

Said = tuple[str, str]
"""A column and its verdict ("ok", or which stage failed and why), or the name of a figure and its value."""
Ranges = Mapping[str, Mapping[str, Sequence[int]]]

_WRAPPING = (
    r"^IBuilder::\w+: Error Code \d+: (Internal Error )?",
    r"^Myelin \(\[[^\]]*\] ",
    r"^(MyelinCheckException: )?\w+\.cpp:\d+: CHECK\(.*?\) failed\. ?",
    r"\.? In \w+ at /_src/\S*$",
    r"^(ONNX Runtime [a-z ]+: )?\[ONNXRuntimeError\] : \d+ : ",
    r"(Non-zero status code returned while running \w+ node\.) Name:'[^']*'",
    r" ?\(?[nN]ode:? ?\(?'?\w+_\d+'?\)?",
    r"^Load model failed:? ?",
    r"/\S+/(?=\w+\.(cc|cpp|h):\d+)",
)  # what says where in the compiler a reason was found, or which node it was


def reason(text: str) -> str:
    """The first line of a message that says something, without what differs from build to build."""
    lines = [line.strip() for line in text.splitlines()]
    said = [x for x in lines if x and not re.search(r"cudaError 35|^---", x)]
    line = said[0] if said else "no reason given"
    for pattern in _WRAPPING:
        line = re.sub(pattern, r"\1" if "status code" in pattern else "", line)
    line = re.sub(r"target\(s\) sm\d+", "target(s) …", line)
    line = re.sub(r"0x[0-9a-f]{6,}", "0x…", line)
    return line.strip(" .") [:200] or "no reason given"


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
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            yield column, f"parser: {reason(next(filter(None, errors), ''))}"
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
    """Load and run in diffc's session ("cpu", "cpu exact"), load without any option ("cpu plain"), and compare."""
    feed = _feed(onnx.load_from_string(model), ranges)
    for column in columns:
        short, _, mode = column.partition(" ")
        provider = _provider(short)
        if mode == "plain":
            yield column, _load_plain(model, provider)
            continue
        verdict, results = _run(model, provider, mode == "exact", feed)
        yield column, verdict
        if mode == "exact" and results is not None:
            yield from _compare(short, model, feed, results)


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


def _compare(short: str, model: bytes, feed: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Said]:
    """The relative L2 distance to onnx.reference, as the power of ten above it; nothing where that cannot run."""
    try:
        wanted = ReferenceEvaluator(onnx.load_from_string(model)).run(None, dict(feed))
    except Exception:  # an operator or type that the evaluator lacks: no reference
        return
    worst = max(distance(np.asarray(w), results[n]) for w, n in zip(wanted, results, strict=True))
    yield f"{short} distance", _power(worst)


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
