"""Backbone -> ONNX graph on fake tensors: no weight is ever allocated.

The model is built, quantized and exported under FakeTensorMode; the exporter then sees shapes and types only.
Its initializers are replaced by recipes over the files that hold the weights (`diffc.frontend.recipes`).
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from diffc.frontend.blocks import find_runs, shortened
from diffc.frontend.complex_numbers import complex_as_pairs
from diffc.frontend.constraints import Symbols, export_under_constraints
from diffc.frontend.copy_blocks import copy_blocks
from diffc.frontend.decompose import decomposed_by_node
from diffc.frontend.equal_blocks import BlocksDiffer
from diffc.frontend.flat import flatten, masks_with_all_rows
from diffc.frontend.names import name_graph
from diffc.frontend.quantizers import TracedQuantizer, describe, traceable
from diffc.frontend.recipes import attach_recipes
from diffc.frontend.translations import translations
from diffc.models.family import Family
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.source import ModelSource
from diffc.models.spec import Config, DimSpec, Shape
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of, role_of
from passes.base import collector_paused
from passes.graph import trt_ops

OPSET = 23
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
_LOG = logging.getLogger(__name__)
IR_VERSION = 11  # that of opset 23; ONNX Runtime 1.31 refuses newer ones


def trace(
    source: ModelSource,
    *,
    dtype: str,
    checkpoint: Checkpoint | None,
    whole: bool = False,
    backbone: FakeBackbone | None = None,
) -> onnx.ModelProto:
    """The backbone as an opset-23 model whose weights are recipes over `source` and `checkpoint`.

    `dtype` is the compute type ("float32", "float16", "bfloat16"). `backbone` is `source` on fake tensors in this type;
    None makes one. Batch, image size and text length are dynamic. Inputs, outputs and dimensions carry the family's
    names; nodes those of their modules. Of many equal blocks in a row a few are traced and the others copied, with the
    same result as a `whole` trace (`diffc.frontend.copy_blocks`).
    """
    with quiet_exporter(), collector_paused():
        program, traced = _export(backbone or FakeBackbone(source, dtype), checkpoint, whole)
        name_graph(program.model, source.family, source.config)
        attach_recipes(program.model, source, traced, checkpoint)
        if any(quantizer.kind.dynamic for quantizer in traced.values()):
            program.model.opset_imports[trt_ops.DOMAIN] = trt_ops.VERSION
        model: onnx.ModelProto = program.model_proto
    model.ir_version = IR_VERSION
    model.producer_name = "diffc"
    return model


def trace_seconds(source: ModelSource) -> float:
    """About how long a trace takes: the import of the exporter, and what it takes for each kind of weight.

    Equal blocks are traced a few times, however many there are: their weights differ in numbers alone.
    """
    kinds = {re.sub(r"\d+", "", name) for name in source.weights}
    return 6.0 + 0.15 * len(kinds)


def _export(
    lent: FakeBackbone, checkpoint: Checkpoint | None, whole: bool
) -> tuple[Any, dict[str, TracedQuantizer]]:
    family, config = lent.source.family, lent.source.config
    shape = trace_shape(family, config)
    backbone = lent.copy()
    with lent.mode:
        if checkpoint is not None:
            checkpoint.apply(backbone, family.name)
        traced = traced_quantizers(checkpoint, lambda name: backbone.get_parameter(name).shape)
        quantizers = {path: backbone.get_submodule(path) for path in traced}
        values = random_inputs(family, config, shape, dtype=lent.dtype, seed=0)
        with traceable(quantizers, traced), torch.no_grad():
            export = _exporter(backbone, family, config, values)
            program = None if whole else _with_copied_blocks(backbone, export)
            return program or export(), traced


def _exporter(
    backbone: torch.nn.Module, family: Family, config: Config, values: dict[str, torch.Tensor]
) -> Callable[[], Any]:
    """What makes the ONNX program of a backbone that gets `values`."""
    if family.interface is None:
        kwargs = forward_kwargs(family, config, values) | {"return_dict": False}
        return lambda: _exported(backbone, kwargs, _dynamic(family, config))

    def export(symbols: Symbols, defer: bool) -> Any:
        tensors = (*backbone.parameters(), *backbone.buffers())
        with (
            unset_fake_temporarily()
        ):  # real tables are copied as they are; modules keep what they make in a trace
            fresh = copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors})
        flatten(fresh, family, config)
        dims = {
            item.name: {i: symbols[d] for i, d in enumerate(item.dims) if isinstance(d, str)} or None
            for item in family.inputs(config)
        }
        with masks_with_all_rows(), complex_as_pairs(fresh):
            return _exported(fresh, values, dims, defer)

    return lambda: export_under_constraints(export, family.dims(config))


def _with_copied_blocks(backbone: torch.nn.Module, export: Callable[[], Any]) -> Any:
    """The ONNX program, traced with few of many equal blocks; None where the others cannot be copied from them."""
    runs = find_runs(backbone)
    try:
        with shortened(backbone, runs):
            program = export()
    except (KeyError, IndexError) as error:  # a list that is read by number, not in order
        if not runs:
            raise
        _LOG.info("tracing every block: a forward() asks for block %s, which was left out", error)
        return None
    try:
        copy_blocks(program.model, runs)
    except BlocksDiffer as error:
        _LOG.info("tracing every block: %s", error)
        return None
    return program


def _exported(
    backbone: torch.nn.Module, kwargs: dict[str, Any], dynamic: dict[str, Any], defer: bool = False
) -> Any:
    """The ONNX program that torch makes of a backbone; `defer`: checks of sizes are left to run time."""
    program = torch.export.export(
        backbone,
        (),
        kwargs=kwargs,
        dynamic_shapes=dynamic,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=defer,
    )
    for node in program.graph.find_nodes(op="call_function", target=_ASSERTION):
        program.graph.erase_node(node)  # the exporter drops them as well, after it has traced each twice
    return to_onnx(program)


def to_onnx(program: torch.export.ExportedProgram) -> Any:
    """The ONNX program of an exported one, operator by operator: at opset 23, with nothing folded."""
    with decomposed_by_node():
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # its constant folder needs values; the pass fold-constants does this work
            verbose=False,
            custom_translation_table=translations(),
        )


def traced_quantizers(
    checkpoint: Checkpoint | None, shape_of: Callable[[str], Sequence[int]]
) -> dict[str, TracedQuantizer]:
    """Every quantizer of `checkpoint` as it is traced, by module path; `shape_of` gives a weight's shape by name."""
    if checkpoint is None:
        return {}
    found = {}
    for path, settings in checkpoint.settings.items():
        is_weight = role_of(path) == "weight_quantizer"
        weight = tuple(shape_of(f"{layer_of(path)}.weight")) if is_weight else None
        amax = checkpoint.amax.get(path)
        found[path] = describe(settings, 0 if amax is None else amax.size, weight)
    return found


def trace_shape(family: Family, config: Config) -> Shape:
    """A small shape to trace at. Every size is distinct and above one, so that none is taken for a constant."""
    multiple = family.pixel_multiple(config)
    return Shape(batch=2, height=4 * multiple, width=6 * multiple, text=20, frames=family.video_frames(3))


def _dynamic(family: Family, config: Config) -> dict[str, Any]:
    """`dynamic_shapes` of torch.export: one symbol for a dimension wherever it appears."""
    dims = {dim.name: _symbol(dim) for dim in family.dims(config)}
    shapes = {
        item.name: {i: dims[d] for i, d in enumerate(item.dims) if isinstance(d, str)} or None
        for item in family.inputs(config)
    }
    return forward_kwargs(family, config, shapes) | {"return_dict": None}


def _symbol(dim: DimSpec) -> Any:
    """A torch.export dimension: `multiple` times a free one."""
    most = None if dim.maximum is None else dim.maximum // dim.multiple
    if dim.multiple == 1:
        return torch.export.Dim(dim.name, min=1, max=most)
    return dim.multiple * torch.export.Dim(f"_{dim.name}", min=1, max=most)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence warnings of the exporter that a user cannot act on (missing torchvision, deprecations)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
