"""Sessions of TensorRT and TensorRT-RTX engines, as `diffc.backends.session.Runtime` has them."""

from __future__ import annotations

from diffc.backends.session import ModelFile, Session
from diffc.backends.signature import Signature
from diffc.backends.tensorrt.run import Engine, EngineFile
from diffc.backends.tensorrt.run import why_not as why_not

__all__ = ["open_session", "why_not"]


def open_session(model: ModelFile, signature: Signature) -> Session:
    """The session of an engine. TensorRT-RTX keeps the kernels that it compiles; TensorRT has them in the engine."""
    cache = model.cache(f"{model.file.stem}.kernels") if model.target.ahead_of_time else None
    profiles = signature.profiles
    engine = EngineFile(
        model.file, model.target, model.device, profiles, cache, model.cuda_graph, model.weights
    )
    return Engine(engine, signature)
