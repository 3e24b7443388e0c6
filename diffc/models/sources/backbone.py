"""The torch backbone of a source: without weights (fake tensors) for a trace, or with them as a reference."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from diffc.errors import DiffcError
from diffc.models.family import Family
from diffc.models.sources.fake import fake_parameters
from diffc.models.sources.misfit import misfit
from diffc.models.sources.quiet import quiet_libraries as quiet_libraries
from diffc.models.sources.source import ModelSource
from diffc.models.sources.torch_loras import fused_tensors
from diffc.models.spec import Config
from diffc.tensors import tensor_of
from passes.base import collector_paused
from passes.weights.sources import np_dtype

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@collector_paused()  # the first call imports diffusers: a million objects that stay
def build_backbone(family: Family, config: Config, dtype: torch.dtype) -> torch.nn.Module:
    """The backbone of a config.json in `dtype`, weights not loaded (and fake under FakeTensorMode)."""
    import diffusers

    with quiet_libraries():
        try:
            model: torch.nn.Module = getattr(diffusers, family.backbone_class).from_config(dict(config))
        except (
            TypeError,
            ValueError,
            RuntimeError,
            ArithmeticError,
            LookupError,
            NotImplementedError,
        ) as error:
            raise DiffcError(
                f"diffusers cannot make a {family.backbone_class} from config.json: {error}",
                fix="take config.json and weights of the same model again",
            ) from error
    kept = frozenset(getattr(type(model), "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():  # Module.to() cannot convert fake parameters
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = torch.float32 if kept & {*path.split("."), name} else dtype
            module.register_parameter(name, torch.nn.Parameter(parameter.detach().to(own), False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module.register_buffer(name, buffer.to(dtype))  # tables that a model computes keep their type
    return model.eval()


class FakeBackbone:
    """The backbone of a source on fake tensors, in the compute type `dtype`: made at first use, then lent.

    diffusers takes seconds to make one, so a compile makes one and lends it to every stage that asks for names, shapes
    or a trace. `module` must stay as it is; a stage that inserts quantizers or leaves out blocks takes a `copy`. Both
    run under `mode` only.
    """

    def __init__(self, source: ModelSource, dtype: str = "float32"):
        self.source, self.dtype = source, DTYPES[dtype]
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The backbone that is lent. Raises DiffcError when diffusers cannot make it."""
        family = self.source.family
        if family.interface is None:
            with self.mode:
                return build_backbone(family, self.source.config, self.dtype)
        with quiet_libraries(), init_empty_weights(include_buffers=False):  # its own tables go into the graph
            model = build_backbone(family, self.source.config, self.dtype)
        fake_parameters(model, self.mode)
        return model

    def copy(self) -> torch.nn.Module:
        """Modules of its own over the same fake parameters and buffers, which hold no values."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        captured = (
            self.source.family.interface is not None
        )  # it has real tables, which are copied as they are
        with unset_fake_temporarily() if captured else self.mode:
            return copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors})


def check_weights(backbone: FakeBackbone) -> None:
    """Raise DiffcError that names a tensor which config.json and the weights do not agree on.

    No weight is read; takes a second or two where `backbone` was not made before.
    """
    source = backbone.source
    state = backbone.module.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    lacking = [name for name in wanted if name not in source.weights]
    strange = set(source.weights) - set(wanted)
    if lacking or strange:
        raise misfit(source.name, lacking, strange)
    for name, shape in wanted.items():
        stored = source.weights[name].shape
        if stored != shape:
            what = f"tensor {name!r} has shape {list(stored)}, and config.json asks for {list(shape)}"
            raise DiffcError(what, fix="check that config.json and the safetensors files belong together")
        kind = np_dtype(source.weights[name].dtype)
        if state[name].is_floating_point() and kind.kind in "iub":
            what = f"tensor {name!r} holds {kind} values, and a weight of {source.family} is of floats"
            raise DiffcError(
                what, fix="download the model again, or say how it is quantized: diffc inspect FILE"
            )


def load_backbone(source: ModelSource, dtype: torch.dtype) -> torch.nn.Module:
    """The backbone with its weights, in `dtype` on the CPU: the reference that compiled graphs are held against.

    Raises DiffcError when the weights do not fit config.json.
    """
    model = build_backbone(source.family, source.config, dtype)
    state = fused_tensors(source, dtype)
    own = {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }  # some stay float32 in 16-bit models
    lacking = {name: r for name, r in source.weights.items() if name not in state}
    state |= {name: tensor_of(r, own.get(name, dtype)) for name, r in lacking.items()}
    try:
        model.load_state_dict(state, assign=False)
    except RuntimeError as error:
        raise DiffcError(
            f"the weights of {source.name} do not fit its config.json: {error}",
            fix="check that both come from the same model",
        ) from error
    return model


def loading_seconds(source: ModelSource) -> float:
    """About how long `load_backbone` takes: the import of diffusers, and the weights at 300 MB/s."""
    return 4.0 + source.nbytes / 3e8
