"""An engine built ahead of time as a model of ONNX Runtime: one EPContext node that refers to the engine's file.

ONNX Runtime's TensorRT-RTX provider loads such a model without building anything. That it takes one around an
engine of our builder is unproven here (no RTX GPU); docs/runtime.md has the command that proves it.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from diffc.errors import DiffcError
from passes.files.atomic import write_bytes
from passes.storage import initializers

PROVIDER = "NvTensorRTRTXExecutionProvider"


def wrap_engine(model: onnx.ModelProto, engine: Path, *, version: str, sm: int) -> onnx.ModelProto:
    """A model with the inputs and outputs of `model` and one node, which runs the file `engine` beside it.

    `version` is that of the TensorRT-RTX that built the engine, which must be the provider's own. Raises
    DiffcError when the engine is not there.
    """
    if not engine.is_file():
        raise DiffcError(f"no such engine: {engine}", fix="build the engine first")
    weights = {tensor.name for tensor in initializers(model)}
    inputs = [value for value in model.graph.input if value.name not in weights]
    node = helper.make_node(
        "EPContext",
        [value.name for value in inputs],
        [value.name for value in model.graph.output],
        name="engine",
        domain="com.microsoft",
        embed_mode=0,
        ep_cache_context=engine.name,
        main_context=1,
        source=PROVIDER,
        partition_name=f"{PROVIDER}_engine",
        hardware_architecture=str(sm),
        ep_sdk_version=version,
    )
    graph = helper.make_graph([node], "engine", inputs, list(model.graph.output))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11, producer_name="diffc")


def write_context(model: onnx.ModelProto, engine: Path, *, version: str, sm: int) -> Path:
    """Write `wrap_engine`'s model beside the engine as <engine>_ctx.onnx, and return its path."""
    path = engine.with_name(f"{engine.stem}_ctx.onnx")
    wrapped = wrap_engine(model, engine, version=version, sm=sm)
    write_bytes(path, wrapped.SerializeToString(deterministic=True))
    return path
