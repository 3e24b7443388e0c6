"""Sessions of ONNX Runtime, as `diffc.backends.session.Runtime` has them."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import replace

import torch

from diffc.backends.onnxruntime.providers import is_plugin
from diffc.backends.onnxruntime.providers import why_not as why_not
from diffc.backends.onnxruntime.recorded import RecordedOrt
from diffc.backends.onnxruntime.run import OrtModel, SessionOptions
from diffc.backends.profile import Profile
from diffc.backends.session import ModelFile, Session
from diffc.backends.signature import Signature
from diffc.backends.target import Target

__all__ = ["open_session", "why_not"]


def open_session(model: ModelFile, signature: Signature) -> Session:
    """The session of a graph. The TensorRT providers keep the engines and kernels that they compile."""
    target = model.target
    options = SessionOptions(model.file, target, model.device)
    if target.prefix:
        options = replace(options, options=_ranges(target, signature.profiles[0]))
        if folder := model.cache(f"{target.name}-{_build_key(model)}"):
            kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
            if is_plugin(target):
                kept = {"nv_runtime_cache_path": f"{folder}.kernels"}
            context = folder if is_plugin(target) else None
            options = replace(options, options={**options.options, **kept}, context=context)
    return RecordedOrt(options, signature) if model.cuda_graph else OrtModel(options, signature)


def _ranges(target: Target, profile: Profile) -> dict[str, str]:
    """The ranges of shapes, in the options of ONNX Runtime's TensorRT providers."""
    bounds = ("min", "opt", "max")
    return {f"{target.prefix}_profile_{b}_shapes": profile_text(profile, b) for b in bounds}


def profile_text(profile: Profile, bound: str) -> str:
    """`name:1x2x3,name:4x5`, as ONNX Runtime's TensorRT providers read ranges; scalars have no range."""
    shapes = {name: getattr(sizes, bound) for name, sizes in profile.inputs.items()}
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items() if shape)


def _build_key(model: ModelFile) -> str:
    """A hash of everything that decides what a TensorRT provider builds."""
    import onnxruntime

    versions = sorted(
        f"{d.name} {d.version}"
        for d in importlib.metadata.distributions()
        if d.name.startswith(("onnxruntime", "tensorrt"))
    )
    parts = [*model.identity, versions, onnxruntime.__version__, torch.cuda.get_device_name(model.device)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
