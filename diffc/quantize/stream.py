"""Runs a module whose weights stay in their files or in CPU memory: each comes to the device while its layer runs.

Linear layers, convolutions and embeddings hold nearly all weights of a backbone or text encoder, so these are streamed;
everything else lies on the device. The order in which layers run is learned in the first pass, and on a GPU the next
ones are then on their way while one computes. What fits into `room` stays there after its first use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffc.quantize.scaling import scaled
from diffc.quantize.state import SCALING

if TYPE_CHECKING:
    from diffc.quantize.state import Amax

Read = Callable[[str], Tensor]
"""A tensor on the CPU by its name in the module's state_dict; nobody writes to it."""
AHEAD = 3
"""Layers whose weights are on their way to a GPU, or there, while one computes."""
_STREAMED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_USES_THEIRS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of their children without calling them."""


@dataclass
class _Arrived:
    """A weight on the device, and on a GPU the event after which it is whole."""

    weight: Tensor
    event: Any = None


class WeightStream:
    """While this is open, `module` runs on `device` with the tensors that `read` gives.

    `module` may have parameters on the meta device; each is given the type that it has there, or `dtype`. Where no
    layer runs, a weight is NaN of its shape, type and device, without memory of its own: code that reads it without
    calling its layer spoils the result, which calibration refuses, and does not go unnoticed. Weights of up to `room`
    bytes stay on the device.
    """

    def __init__(
        self,
        module: nn.Module,
        read: Read,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        room: int = 0,
    ) -> None:
        self._read, self._device, self._room = read, device, room
        self._layers = _streamed_layers(module)
        self._names = {id(layer): path for path, layer in self._layers.items()}
        self._held: dict[str, Tensor] = {}
        self._open: set[str] = set()
        self._coming: dict[str, Future[_Arrived]] = {}
        self._after: dict[str, str] = {}
        self._last = ""
        self._scaling: dict[str, dict[str, Amax]] = {}
        self._done: deque[Any] = deque()
        self._nan: dict[torch.dtype, Tensor] = {}
        self._cuda = device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, "weights") if self._cuda else None
        self._side = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._put_rest(module, dtype)
        self._hooks = [hook for path, layer in self._layers.items() for hook in self._hooked(path, layer)]

    @property
    def on_gpu(self) -> bool:
        """Whether the layers run on a GPU."""
        return self._cuda

    def close(self) -> None:
        """Stop streaming; the module is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._coming.clear()
        self._held.clear()

    @contextmanager
    def access(self, layer: nn.Module) -> Iterator[None]:
        """While open, `layer` has its weight, to be looked at and changed: in the way that a format scales weights.

        What is changed is dropped. The factors and the branch that the layer's quantizers have afterwards
        (`diffc.quantize.scaling`) are kept, and every later load applies them.
        """
        path = self._names.get(id(layer))
        if path is None or path in self._open:  # ModelOpt's methods call each other
            yield
            return
        self._open.add(path)
        self._held.pop(path, None)
        self._put(path, self._here(self._load(path)).clone())
        yield
        self._scaling[path] = _scaling_of(layer)
        self._drop(path)
        self._open.remove(path)

    def _put_rest(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        streamed = {id(layer) for layer in self._layers.values()}
        for prefix, owner in module.named_modules():
            start = f"{prefix}." if prefix else ""
            for name, tensor in list(owner._parameters.items()):
                if tensor is None:
                    continue
                kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                if id(owner) in streamed and name == "weight":
                    value = self._nothing(tensor.shape, kind)
                else:
                    value = self._read(start + name).to(self._device, kind, copy=True)
                owner.register_parameter(name, nn.Parameter(value, requires_grad=False))
            for name, buffer in list(owner._buffers.items()):
                if buffer is not None:
                    owner._buffers[name] = buffer.to(self._device)

    def _nothing(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if dtype not in self._nan:
            self._nan[dtype] = torch.full((), torch.nan, dtype=dtype, device=self._device)
        return self._nan[dtype].expand(shape)

    def _hooked(self, path: str, layer: nn.Module) -> tuple[Any, Any]:
        def before(_: nn.Module, __: Any) -> None:
            self._put(path, self._arrive(path))

        def after(_: nn.Module, __: Any, ___: Any) -> None:
            self._drop(path)

        return layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)

    def _arrive(self, path: str) -> Tensor:
        """The weight of the layer that is about to run; the next ones are sent for."""
        self._after[self._last] = path
        self._last = path
        if path in self._held:
            self._send_for_next(path)
            return self._held[path]
        future = self._coming.pop(path, None)
        arrived = self._load(path) if future is None else future.result()
        self._send_for_next(path)
        weight = self._here(arrived)
        if weight.nbytes <= self._room:
            self._room -= weight.nbytes
            self._held[path] = weight
        return weight

    def _here(self, arrived: _Arrived) -> Tensor:
        """The weight, which what is launched from now on waits for."""
        if arrived.event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived.event)
            arrived.weight.record_stream(current)
        return arrived.weight

    def _send_for_next(self, path: str) -> None:
        if self._pool is None:
            return
        for _ in range(AHEAD):
            path = self._after.get(path, "")
            if not path:
                return
            if path not in self._held and path not in self._coming:
                self._coming[path] = self._pool.submit(self._load_soon, path)

    def _load_soon(self, path: str) -> _Arrived:
        """Load a weight as soon as an earlier layer is done with its own, so that memory stays bounded."""
        while len(self._done) > AHEAD:
            with suppress(IndexError):
                self._done.popleft().synchronize()
        return self._load(path)

    def _load(self, path: str) -> _Arrived:
        stored = self._read(f"{path}.weight")
        dtype = self._layers[path]._parameters["weight"].dtype  # type: ignore[union-attr]
        own = self._scaling.get(path)
        if self._side is None:
            weight = stored.to(dtype) if stored.dtype != dtype else stored.clone()  # aligned as torch aligns
            return _Arrived(scaled(weight, own) if own else weight)
        with torch.cuda.stream(self._side):
            weight = stored.pin_memory().to(self._device, non_blocking=True).to(dtype)
            weight = scaled(weight, own) if own else weight
        return _Arrived(weight, self._side.record_event())

    def _put(self, path: str, weight: Tensor) -> None:
        parameter: Any = self._layers[path]._parameters["weight"]
        parameter.data = weight

    def _drop(self, path: str) -> None:
        parameter: Any = self._layers[path]._parameters["weight"]
        parameter.data = self._nothing(parameter.shape, parameter.dtype)
        if self._cuda:
            self._done.append(torch.cuda.current_stream(self._device).record_event())


def _streamed_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights come when they run, by path."""
    found: dict[str, nn.Module] = {}
    skipped = set[str]()
    for path, layer in module.named_modules():
        parent = path.rpartition(".")[0]
        if isinstance(layer, _USES_THEIRS) or parent in skipped:
            skipped.add(path)
        elif isinstance(layer, _STREAMED) and "weight" in layer._parameters:
            found[path] = layer
    return found


def _scaling_of(layer: nn.Module) -> dict[str, Amax]:
    """Channel factors and low-rank branch of a quantized layer, as `scaled` takes them."""
    quantizers = [getattr(layer, f"{role}_quantizer", None) for role in ("input", "weight")]
    pairs = ((kind, getattr(quantizer, f"_{kind}", None)) for quantizer in quantizers for kind in SCALING)
    return {kind: value.detach().float().cpu().numpy() for kind, value in pairs if value is not None}
