"""The module that replaces `pipe.transformer` or `pipe.unet`: torch in and out, a compiled graph inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path as FilePath
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from diffc.backends.session import Session
from diffc.backends.signature import Signature
from diffc.backends.torch_types import TORCH_TYPES
from diffc.cache.generations import CacheReport
from diffc.errors import DiffcError
from diffc.models.family import Family
from diffc.models.lists import joined
from diffc.models.nested import Path, dotted, places, without_repeats
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.stand_in import class_of, full_config, take_attributes
from diffc.runtime.cached import CachedSession
from diffc.runtime.lora import LoraSlots

_HOOKS = ("_hf_hook", "_diffusers_hook")
_NO_OFFLOAD = (
    "a compiled backbone cannot be offloaded: its weights belong to the runtime, and stay where they are"
)


class NotCompiledError(DiffcError, AttributeError):
    """What a torch backbone has and a compiled one cannot have; `hasattr` is False for an attribute."""


class CompiledBackbone(nn.Module):
    """A compiled backbone as diffusers calls it; `diffc.load` makes it.

    Inputs are cast to the graph's types and made contiguous; nothing is padded, and what the graph has no input
    for is refused. A time that is one number counts for every image. The output is a new tensor, of the type of the
    first input. Threads may call it at the same time. It has no parameters: `.to()` changes `dtype` alone, and raises
    DiffcError for another device.
    """

    def __init__(
        self,
        session: Session,
        signature: Signature,
        spec: Family,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        target: str,
        slots: LoraSlots | None = None,
    ):
        super().__init__()
        self._slots, self._lora = slots, dict[str, Tensor]()
        self.target, self._spec, self._signature = target, spec, signature
        self.config = full_config(spec, config)
        self._session, self._dtype = session, dtype
        self._outputs = spec.outputs(config)
        inputs = spec.inputs(config)
        self._paths: dict[Path, str] = {item.path or (item.name,): item.name for item in inputs}
        self._positions = [str(path[0]) for path in self._paths if len(path) == 1]
        self._fixed = dict(spec.constants)
        self._nested = {path[0] for path in (*self._paths, *self._fixed) if len(path) > 1}
        self._numbers = {item.name for item in inputs if item.sample == "size"}
        take_attributes(self, spec, config)
        self.eval()
        self._backbone_class = spec.backbone_class

    @property
    def dtype(self) -> torch.dtype:
        """The type that the pipeline makes its tensors in."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self._session.device

    @torch.no_grad()
    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """As the diffusers backbone of this family; `return_dict=False` gives a tuple of tensors.

        Raises DiffcError for a missing or unknown argument, for one that the graph has no input for, and for
        tensors whose shape or device does not fit.
        """
        given = self._named(args, kwargs)
        inputs = self._tensors(given)
        sizes = self._signature.check({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        outputs = self._session.run({**inputs, **self._lora}, self._signature.output_shapes(sizes))
        dtype = given[self._signature.inputs[0].name].dtype
        found = {item.field: outputs[item.name].to(dtype) for item in self._outputs}
        return _output_class(self._spec)(**found) if return_dict else tuple(found.values())

    @contextmanager
    def cache_context(self, name: str, **place: Any) -> Iterator[None]:
        """diffusers' name for the branch of guidance that runs ("cond", "uncond"), which keeps its own.

        `place` says where the loop is (step_index, sigma), which a plan counts by itself.
        """
        del place
        if isinstance(self._session, CachedSession):
            with self._session.branch(name):
                yield
        else:
            yield

    def start(self, steps: int) -> None:
        """A generation of `steps` denoising steps begins in this thread: nothing that was kept before is used.

        Only plans that depend on the number of steps need this; a new prompt, shape or start is seen without.
        """
        if isinstance(self._session, CachedSession):
            self._session.generations.reset(steps)

    def set_lora(
        self,
        files: str | FilePath | LoraSpec | Sequence[str | FilePath | LoraSpec] = (),
        weights: float | Sequence[float] | None = None,
        *,
        partial: bool = False,
    ) -> tuple[str, ...]:
        """Take these LoRAs from the next call on, in the place of those before; without files, none.

        `files`: paths, ids of the hub, or texts as of `--lora`; `weights` replace those in the texts. Returns a line
        for each file that says what of it counts. Raises DiffcError, and changes nothing, when the model was compiled
        without --lora-slots, and as `diffc.runtime.lora.LoraSlots.values` does.
        """
        wanted = [files] if isinstance(files, str | FilePath | LoraSpec) else list(files)
        strengths = [weights] if isinstance(weights, int | float) else weights
        if not wanted:
            self._lora = {}
            return ()
        if self._slots is None:
            raise DiffcError(
                f"this backbone was compiled without LoRA slots, or runs on {self.target}, which has none",
                fix="compile with --lora-slots RANK, or fuse the LoRA: diffc relora ARTIFACT --lora FILE",
            )
        self._lora, applied = self._slots.values(wanted, strengths, partial=partial, device=self.device)
        return tuple(item.summary() for item in applied)

    def cache_report(self) -> CacheReport:
        """How many steps ran so far, and how many of them used kept values; none did without a cache plan."""
        return self._session.generations.report if isinstance(self._session, CachedSession) else CacheReport()

    def close(self) -> None:
        """Free the session: weights, memory and caches. A closed module runs no more."""
        self._session.close()

    def __enter__(self) -> CompiledBackbone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOOKS:
            raise DiffcError(
                _NO_OFFLOAD,
                fix="call pipe.remove_all_hooks(), then move the other components with pipe.to(device)",
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Refuse what diffusers can do to a torch backbone and nobody can to a compiled one, with the way out."""
        kind = self.__dict__.get("_backbone_class", "")
        if not kind or name.startswith("_") or not hasattr(class_of(kind), name):
            return super().__getattr__(name)
        error = NotCompiledError(
            f"a compiled backbone has no {name}: its weights and operators are those of the compile",
            fix="do it to the torch model (for a LoRA: load_lora_weights, fuse_lora, unload_lora_weights),"
            " save_pretrained, and compile that",
        )
        if not callable(getattr(class_of(kind), name)):
            raise error

        def refused(*_: Any, **__: Any) -> Any:
            raise error

        return refused

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledBackbone:
        """What .to(), .half(), .cuda() and their like come down to."""
        del recurse
        moved = fn(torch.empty(0, dtype=self._dtype, device=self.device))
        if moved.device != self.device:
            raise DiffcError(
                f"a compiled backbone stays where it was loaded, on {self.device}, and cannot go to {moved.device}",
                fix=f'load it there: diffc.load(artifact, device="{moved.device}")',
            )
        self._dtype = moved.dtype
        return self

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every graph input."""
        if len(args) > len(self._positions):
            raise DiffcError(f"give all but {', '.join(self._positions)} by name", fix="write NAME=VALUE")
        named: dict[str, Any] = dict(zip(self._positions, args, strict=False))
        named |= without_repeats(kwargs)
        given: dict[Path, Any] = {}
        for name, value in joined(named, self._spec.lists).items():
            entries = places(value, (name,)) if name in self._nested else {(name,): value}
            given |= {path: v for path, v in entries.items() if not _empty(v)}
        self._check_fixed(given)
        given = {path: value for path, value in given.items() if path not in self._fixed}
        refused = [dotted(path) for path in given if path not in self._paths]
        missing = [dotted(path) for path in self._paths if given.get(path) is None]
        if refused:
            raise DiffcError(
                f"the compiled {self._spec.name} backbone has no input for {', '.join(refused)}",
                fix="leave it out (compile LoRA, ControlNet or IP adapters into the model), or run it in torch",
            )
        if missing:
            raise DiffcError(f"no value for {', '.join(missing)}", fix="call it as diffusers' pipeline does")
        return {self._paths[path]: value for path, value in given.items()}

    def _check_fixed(self, given: Mapping[Path, Any]) -> None:
        """Raise DiffcError for an argument with another value than the one that the graph was made with."""
        for path, value in self._fixed.items():
            other = given.get(path, value)
            if isinstance(other, torch.Tensor) or other != value:
                raise DiffcError(
                    f"{dotted(path)} is {other!r}, and the compiled {self._spec.name} backbone holds for {value!r}",
                    fix="call the pipeline as for the compile, or compile a pipeline whose default it is",
                )

    def _tensors(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """In graph order and of the graph's types, contiguous, on the device."""
        tensors = {}
        batch = len(given[self._signature.inputs[0].name])
        for value in self._signature.inputs:
            if value.name in self._numbers:
                length, dtype = int(given[value.name]), TORCH_TYPES[value.dtype]
                tensors[value.name] = torch.zeros(length, dtype=dtype, device=self.device)
                continue
            tensor = torch.as_tensor(given[value.name])
            if len(value.dims) < 2:
                tensor = _as_times(tensor, value.dims, batch)
            if tensor.device != self.device:
                if tensor.numel() != 1:
                    raise DiffcError(
                        f"input {value.name} is on {tensor.device}, and the compiled backbone on {self.device}",
                        fix=f'pipe.to("{self.device}")',
                    )
                tensor = tensor.to(self.device)
            tensors[value.name] = tensor.to(TORCH_TYPES[value.dtype]).contiguous()
        return tensors


def _as_times(tensor: Tensor, dims: tuple[str | int, ...], batch: int) -> Tensor:
    """A time as the graph takes it: one number, or one for each image.

    Pipelines give a number, one of any rank, or one for each image. What does not fit is left as it is, and refused.
    """
    if not dims and tensor.numel() == 1:
        return tensor.reshape(())
    if len(dims) == 1 and tensor.numel() == 1:
        return tensor.reshape(1).expand(1 if dims[0] == 1 else batch)
    if dims in ((), (1,)) and tensor.ndim == 1 and bool((tensor == tensor[0]).all()):
        return tensor[0] if not dims else tensor[:1]
    return tensor


def _empty(value: Any) -> bool:
    """Not given: None, or a container with nothing in it, as pipelines pass `joint_attention_kwargs`."""
    return value is None or (isinstance(value, Mapping | list | tuple) and not value)


def _output_class(spec: Family) -> Any:
    """The class of what diffusers' forward() returns; without diffusers, one that has the attribute alone."""
    module, _, name = spec.output_class.partition(":")
    if spec.interface is not None and module.partition(".")[0] != "diffusers":
        return SimpleNamespace  # a manifest names it: no other module of this machine is imported for a file
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        return SimpleNamespace
    return found if isinstance(found, type) else SimpleNamespace
