"""Turns what TensorRT or the operating system says into an error that names the node and the fix."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError

# Texts as TensorRT-RTX 1.7.1 writes them. The first that matches gives the fix.
_FIXES = (
    (r"Attention operation was not supported by a dedicated kernel",
     "run the pass decompose-attention: this head size or element type has no attention kernel"),
    (r"INormalizationLayer .*must have identical types",
     "cast scale and bias of the normalization to the type of its input"),
    (r"must have (the )?(same|identical)( input)? types",
     "the network is strongly typed: put a Cast in front of the input of the other type"),
    (r"HW-specific datatypes",
     "leave out the compute capabilities that lack this type, or choose another --format"),
    (r"Plugin not found|failed to load \w+ plugin|plugin creator",
     "this operator is not one of TensorRT's: export standard ONNX operators (diffc opt lists the rewrites)"),
    (r"only the quantization axis may be blocked",
     "leave this layer unquantized: block quantization fits matrices, not convolution kernels"),
    (r"block size does not divide|blocked axis should be known",
     "leave this layer unquantized: its last dim must be fixed, and a multiple of the block size"),
    (r"Non-zero zero point",
     "quantize symmetrically: TensorRT's zero points are zero"),
    (r"only allowed before DQ|is not (consumed|produced) by IPluginLayer|Unsupported data type for the Cast",
     "replace this Cast: tensors of quantized types pass through QuantizeLinear and DequantizeLinear only"),
    (r"has type Int32 but must have type FP8",
     "store this weight as FLOAT8E4M3FN, not as bytes"),
    (r"infer output types for operation:[\s\d:]*dequantize",
     "let DequantizeLinear give the type of its scales, and put a Cast after it"),
    (r"infer output types for operation:[\s\d:]*deconv",
     "give --dtype float16: TensorRT has no transposed convolution in bfloat16"),
    (r"for Turing \(SM75\)",
     "give --dtype float16, or leave out --sm 75"),
    (r"Failed to import initializer",
     "TensorRT cannot read this element type: quantize to INT8, INT4, FLOAT8E4M3FN or FLOAT4E2M1"),
    (r"no optimization profile",
     "give a profile with a minimum, optimum and maximum shape for each dynamic input"),
    (r"perm\.size\(\) == t\.size\(\)",
     "run the pass add-zero-bias: NVFP4 layers of one input and one global scale are in front of FP8 attention"),
    (r"softcap|hasSoftmaxPrecision|Attention nodes with one output",
     "run the pass decompose-attention: TensorRT's Attention lacks this option"),
    (r"UNSUPPORTED_NODE",
     "run the passes of the target's preset (diffc opt): TensorRT has no such operator"),
    (r"[Oo]ut of memory|bad_alloc|MemoryError|cudaErrorMemoryAllocation",
     "free memory, or build where there is more: the builder holds the weights several times"),
    (r"No space left",
     "free some disk space"),
)  # fmt: skip
_NATIVE_NOISE = re.compile(r"cudaError 35|^\s*--- |^\s*$")  # said on every machine without a driver

_CRASHES = {
    "SIGKILL": ("was killed, most often because the machine ran out of memory",
                "close other programs, or build on a machine with more memory"),
    "SIGSEGV": ("crashed inside TensorRT (segmentation fault)", ""),
    "SIGABRT": ("stopped inside TensorRT (abort)", ""),
    "0xC0000005": ("crashed inside TensorRT (access violation)", ""),
    "0xC0000017": ("ran out of memory", "close other programs, or build on a machine with more memory"),
}  # fmt: skip
_CRASH_FIX = "find the layer by building parts of the model; read the log, and report it with the model"


def fix_for(text: str) -> str:
    """The fix for a fault that TensorRT describes in `text`; empty for an unknown fault."""
    return next((fix for pattern, fix in _FIXES if re.search(pattern, text)), "")


def parser_error(model: Path, faults: Sequence[Mapping[str, Any]], log: Path) -> DiffcError:
    """The error for a model that the parser rejects, node by node, in the parser's words."""
    lines = [f"TensorRT's parser rejects {model}:"]
    for fault in faults:
        where = f"node {fault['node']!r} ({fault['op']})" if fault["op"] else "the graph"
        lines.append(f"  {where}: [{fault['code']}] {_clean(fault['text'])}")
    everything = " ".join(f"{f['code']} {f['text']}" for f in faults)
    return DiffcError("\n".join(lines), fix=fix_for(everything) or f"read the log: {log}")


def builder_error(model: Path, messages: Sequence[str], log: Path) -> DiffcError:
    """The error for a network that the builder rejects, with the errors that it logged."""
    said = [_clean(m) for m in messages if _clean(m)] or ["it gave no reason"]
    what = "\n  ".join([f"TensorRT cannot build {model}:", *said, *_full_disk(model, log)])
    return DiffcError(what, fix=fix_for(what) or f"read the log: {log}")


def crash_error(model: Path, returncode: int, log: Path) -> DiffcError:
    """The error for a builder process that ended without an answer. `returncode` is that of `subprocess`."""
    code = _name_of(returncode)
    how, fix = _CRASHES.get(code, ("ended without an answer", ""))
    tail = "\n".join(f"  | {line}" for line in [*_tail(log), *_full_disk(model, log)])
    what = f"the builder process for {model} {how} ({code}). Its log, {log}, ends with:\n{tail}"
    return DiffcError(what, fix=fix or fix_for(tail) or _CRASH_FIX)


def _full_disk(model: Path, log: Path) -> list[str]:
    """What TensorRT does not say: that an engine, which is about as large as its model, has no room beside its log."""
    size = sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))
    free = shutil.disk_usage(log.parent).free
    if free >= size:
        return []
    return [f"No space left for an engine of about {size / 1e6:.0f} MB: {free / 1e6:.0f} MB are free"]


def _name_of(returncode: int) -> str:
    if -returncode in list(signal.Signals):  # subprocess gives a signal as a negative number
        return signal.Signals(-returncode).name
    return f"0x{returncode:X}" if returncode > 0xFFFF else f"exit code {returncode}"


def _tail(log: Path, lines: int = 8) -> list[str]:
    text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    return text.splitlines()[-lines:] or ["(nothing)"]


def _clean(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if not _NATIVE_NOISE.search(line)]
    return " ".join(dict.fromkeys(lines))
