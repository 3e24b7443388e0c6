"""Opens a pipeline for a calibration in the room that there is.

The backbone's weights stay in their files and the encoders' in CPU memory, as they are stored; both go to the device
layer by layer. The encoders are dropped when the prompts are encoded, and a VAE is loaded only for a pipeline that
takes images. Prompts that an interrupted calibration has encoded need no encoder again.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from diffc.models.sources.backbone import build_backbone
from diffc.models.sources.components import components_of
from diffc.models.sources.inside import inside
from diffc.models.sources.json_files import read_json
from diffc.models.sources.pipelines import open_pipeline, pipeline_class
from diffc.models.sources.source import ModelSource
from diffc.models.sources.torch_weights import TorchWeights, fill_buffers
from diffc.quantize.bounded import Bounded
from diffc.quantize.encoded import EncodedPrompts
from diffc.quantize.pipeline_call import IMAGE_ARGUMENTS
from diffc.quantize.stream import Read, WeightStream
from diffc.tensors import mapped_tensor
from passes.weights.mapped import MappedFiles
from passes.weights.recipe import Recipe

_FIX = "download the whole pipeline (tokenizers, text encoders, VAE, scheduler), or --from-checkpoint"


_WORKING = 6_000_000_000
"""Bytes of a GPU that activations and weights on their way may take: some 3 GB for 4 images of 1,024 px in FLUX.1."""


def free_room(device: torch.device) -> int:
    """Bytes of weights that may stay on a device (`spare`)."""
    gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if gpu else psutil.virtual_memory().available
    return spare(int(free), device_is_gpu=gpu)


def spare(free: int, *, device_is_gpu: bool) -> int:
    """Of `free` bytes, those that weights may keep: half of what a calibration does not need for itself."""
    return max(0, free - (_WORKING if device_is_gpu else 0)) // 2


@contextmanager
def opened_bounded(
    source: ModelSource,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    work: Path,
    room: int,
    together: int | None = None,
) -> Iterator[tuple[Any, Bounded]]:
    """The pipeline in the folder of `source`, offline, and what `calibrate` needs to run it in bounded room.

    `dtypes`: the type in which each component computes, by name and "default". `room`: bytes of the backbone's weights
    that stay on the device. `work`: a folder for encoded prompts. `together`: see `Bounded`. The pipeline paints no
    images: its VAE may have no weights.
    """
    folder, component = source.pipeline_dir, source.family.component
    assert folder is not None  # a pipeline in memory, or none, is not opened
    encoded = EncodedPrompts(work)

    def dtype_of(name: str) -> torch.dtype:
        return dtypes.get(name, dtypes["default"])

    parts: dict[str, Any] = {component: _empty_backbone(source, dtype_of(component))}
    for name in _without_weights(folder, encoded.encoders or (), source):
        parts[name] = _empty(folder, name, dtype_of(name))
    encoders = [name for name in _from_transformers(folder) if name not in parts]
    types: dict[str, Any] = {**dtypes, **dict.fromkeys(encoders, "auto")}
    pipe = open_pipeline(source, dtype=types, fix=_FIX, **parts)
    with ExitStack() as stack:
        streams: dict[str, WeightStream] = {}
        for name in (n for n in encoders if isinstance(getattr(pipe, n, None), nn.Module)):
            module = getattr(pipe, name)
            streams[name] = WeightStream(module, _own_tensors(module), device, dtype=dtype_of(name))
            stack.callback(streams[name].close)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name not in (*streams, *parts):
                part.to(device)
        stream = WeightStream(parts[component], _stored_tensors(source.weights), device, room=room)
        stack.callback(stream.close)

        def release(names: Sequence[str]) -> None:
            for name in names:
                if name in streams:
                    streams.pop(name).close()
                getattr(pipe, name).to("meta")
            gc.collect()

        yield _on_device(pipe, device), Bounded(stream, encoded, release, together)


def _empty_backbone(source: ModelSource, dtype: torch.dtype) -> nn.Module:
    """The backbone with its parameters on the meta device and its buffers filled."""
    with init_empty_weights(include_buffers=False):
        backbone = build_backbone(source.family, source.config, dtype)
    fill_buffers(backbone, TorchWeights(source.weights), dtype)
    return backbone


def _stored_tensors(weights: Mapping[str, Recipe]) -> Read:
    files, plain = MappedFiles(), dict[str, Tensor]()

    def read(name: str) -> Tensor:
        if name in plain:
            return plain[name]
        found, recipe = mapped_tensor(weights[name], files), weights[name]
        if not recipe.ops and recipe.source.kind == "raw":  # the file itself, and no memory
            plain[name] = found
        return found

    return read


def _own_tensors(module: nn.Module) -> Read:
    tensors: dict[str, Tensor] = {
        name: parameter.detach() for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    return tensors.__getitem__


def _without_weights(folder: Path, encoders: Sequence[str], source: ModelSource) -> Iterator[str]:
    """The components that this calibration does not run: encoders of prompts that are encoded, and a VAE."""
    yield from encoders
    takes_images = not _parameters(folder).isdisjoint(IMAGE_ARGUMENTS)
    beside = any(name.startswith(("first_stage_model.", "vae.")) for name in source.beside)
    if not takes_images and not beside and _class_of(folder, "vae") is not None:
        yield "vae"


def _parameters(folder: Path) -> set[str]:
    """What the call of the pipeline in a folder takes; all that may be an image, for a class that is not known."""
    classes = pipeline_class(folder).__mro__
    call = next((vars(cls)["__call__"] for cls in classes if "__call__" in vars(cls)), None)
    return set(inspect.signature(call).parameters if call else IMAGE_ARGUMENTS)


def _from_transformers(folder: Path) -> list[str]:
    """The components of a pipeline whose classes are transformers' models."""
    return [
        name for name in components_of(folder)[0] if issubclass(_class_of(folder, name) or str, nn.Module)
    ]


def _class_of(folder: Path, name: str) -> Any:
    """The class of a component that is diffusers' or transformers' own; None for any other."""
    library, class_name = read_json(folder / "model_index.json").get(name) or (None, None)
    if library not in ("diffusers", "transformers") or class_name is None:
        return None
    return getattr(_library(library), class_name, None)


@lru_cache(maxsize=2)
def _library(name: str) -> Any:
    import diffusers
    import transformers

    return {"diffusers": diffusers, "transformers": transformers}[name]


def _empty(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """A component with its config and no weights."""
    cls, place = _class_of(folder, name), inside(folder, name)
    with init_empty_weights():
        if hasattr(cls, "load_config"):
            made = cls.from_config(cls.load_config(place))
        else:
            made = cls(cls.config_class.from_pretrained(place))
    module: nn.Module = made.to(dtype)
    return module.eval()


def _on_device(pipe: Any, device: torch.device) -> Any:
    """The pipeline, which takes `device` for the place of its components: some have no weights there, or none yet."""
    cls = type(pipe)
    where = property(lambda self: device)
    pipe.__class__ = type(cls.__name__, (cls,), {"device": where, "_execution_device": where})
    return pipe
