"""Runs a module whose weights stay in their files or in CPU memory: each comes to the device while its layer runs.

Linear layers, convolutions and embeddings hold nearly all weights of a backbone or text encoder, so these are streamed;
everything else lies on the device. The order in which layers run is learned in the first pass, and on a GPU the next
ones are then on their way while one computes. What fits into `room` stays there after its first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffc.quantize.arrivals import Arrivals, Copy
from diffc.quantize.scaling import scaled
from diffc.quantize.state import SCALING

if TYPE_CHECKING:
    from diffc.quantize.state import Amax

Read = Callable[[str], Tensor]
"""A tensor on the CPU by its name in the module's state_dict; nobody writes to it."""
_LOOK_AHEAD = 64
_STREAMED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_USES_THEIRS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of their children without calling them."""


class WeightStream:
    """While this is open, `module` runs on `device` with the tensors that `read` gives.

    `module` may have parameters on the meta device; each is given the type that it has there, or `dtype`. Where no
    layer runs, a weight is NaN of its shape, type and device, without memory of its own: code that reads it without
    calling its layer spoils the result, which calibration refuses, and does not go unnoticed. Weights of up to `room`
    bytes stay on the device.

    Several runs of the module may be under way in turns (`in_turns`): the weights of as many layers as fit into a
    window stay until each run has passed these layers, and come once for all of them.
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
        self._read, self._device, self.room = read, device, room
        self._layers = _streamed_layers(module)
        self._names = {id(layer): path for path, layer in self._layers.items()}
        self._held: dict[str, Tensor] = {}
        self._open: set[str] = set()
        self._after: dict[str, str] = {}
        self._last = ""
        self._there: dict[str, int] = {}
        self._scaling: dict[str, dict[str, Amax]] = {}
        self._nan: dict[torch.dtype, Tensor] = {}
        self.arrivals = Arrivals(device, self._make)
        self._pass_on: Callable[[], None] | None = None
        self._put_rest(module, dtype)
        parameters = {path: layer._parameters["weight"] for path, layer in self._layers.items()}
        self._sizes = {path: p.numel() * p.element_size() for path, p in parameters.items() if p is not None}
        self._hooks = [hook for path, layer in self._layers.items() for hook in self._hooked(path, layer)]

    @property
    def on_gpu(self) -> bool:
        """Whether the layers run on a GPU."""
        return self.arrivals.on_gpu

    @property
    def layers(self) -> Iterator[nn.Module]:
        """The layers whose weights come when they run."""
        return iter(self._layers.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the weights that do not stay on the device, by the path of their layer."""
        return {path: n for path, n in self._sizes.items() if path not in self._held}

    @property
    def present(self) -> int:
        """Bytes of the weights that stay on the device, and of those whose layers run."""
        return sum(self._sizes[path] for path in self._held) + sum(self._there.values())

    @contextmanager
    def in_turns(self, pass_on: Callable[[], None]) -> Iterator[None]:
        """While open, runs of the module are in turns (`diffc.quantize.lanes`): `pass_on` lets the next one go on."""
        self._pass_on = pass_on
        try:
            yield
        finally:
            self._pass_on = None
            self._leave()

    def let_go(self) -> bool:
        """Give back the room of weights that stay on the device; none stays from here on, and whether any did."""
        had = bool(self._held)
        self.room = 0
        self.arrivals.forget()
        self._held.clear()
        self._leave()
        return had

    def close(self) -> None:
        """Stop streaming; the module is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        self.arrivals.close()
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
        self._leave()
        self._held.pop(path, None)
        self._put(path, self.arrivals.take(path).clone())
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
            if path not in self._there:
                self._in_turn(path)
                self._enter(path)

        def after(_: nn.Module, __: Any, ___: Any) -> None:
            if self._pass_on is None:
                self._leave()

        return layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)

    def _in_turn(self, path: str) -> None:
        """Where the window is full, let the other runs pass its layers, and then empty it."""
        if self._pass_on is not None and self._is_full(path):
            self._pass_on()
            if path not in self._there and self._is_full(path):
                self._leave()

    def _is_full(self, path: str) -> bool:
        more = 0 if path in self._held else self._sizes[path]
        return bool(self._there) and sum(self._there.values()) + more > self.arrivals.window

    def _enter(self, path: str) -> None:
        if path not in self._there:  # another run may have come here first
            self._put(path, self._arrive(path))
            self._there[path] = 0 if path in self._held else self._sizes[path]

    def _leave(self) -> None:
        """The layers whose weights are there need them no more."""
        for path in self._there:
            self._drop(path)
        self._there.clear()

    def _arrive(self, path: str) -> Tensor:
        """The weight of the layer that is about to run; the next ones are sent for."""
        self._after[self._last] = path
        self._last = path
        weight = self._held.get(path)
        if weight is None:
            weight = self.arrivals.take(path)
        self.arrivals.send(self._next_after(path))
        if path not in self._held and weight.nbytes <= self.room:
            self.room -= weight.nbytes
            self._held[path] = weight
        return weight

    def _next_after(self, path: str) -> Iterator[str]:
        """The layers after one whose weights fit into a window; at least one, where the order is known."""
        size = 0
        for _ in range(_LOOK_AHEAD):
            path = self._after.get(path, "")
            if not path or path in self._there:
                return
            if path not in self._held:
                size += self._sizes[path]
                if size > max(self.arrivals.window, self._sizes[path]):
                    return
                yield path

    def _make(self, path: str, copy: Copy) -> Tensor:
        """The weight of a layer on the device, in the type that it has there, scaled as its format scales it."""
        weight = copy(self._read(f"{path}.weight"))
        weight = weight.to(self._layers[path]._parameters["weight"].dtype)  # type: ignore[union-attr]
        own = self._scaling.get(path)
        return scaled(weight, own) if own else weight

    def _put(self, path: str, weight: Tensor) -> None:
        parameter: Any = self._layers[path]._parameters["weight"]
        parameter.data = weight

    def _drop(self, path: str) -> None:
        parameter: Any = self._layers[path]._parameters["weight"]
        parameter.data = self._nothing(parameter.shape, parameter.dtype)
        self.arrivals.used(0 if path in self._held else self._sizes[path])


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
