"""Prompts encoded before a calibration, so that text encoders and backbone are never in memory together.

Nothing here is special to a pipeline class. Its call runs up to the first call of the backbone, and what its
`encode_prompt` returns on the way is kept in files. The same call later is given these in the place of the encoders.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.files.atomic import write_bytes, write_text

_ENCODERS = "encoders.json"


class _Reached(Exception):
    """The backbone was called: the prompts are encoded."""


class EncodedPrompts:
    """What `encode_prompt` of a pipeline returns for each batch of prompts, in `folder`, which need not exist.

    What lies there from an earlier call with the same pipeline and prompts is used.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    @property
    def encoders(self) -> tuple[str, ...] | None:
        """Components that ran in `encode_prompt` and nowhere else; None before all prompts are encoded."""
        file = self._folder / _ENCODERS
        return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def encode(
        self,
        pipe: Any,
        component: str,
        calls: Sequence[Callable[[], Mapping[str, Any]]],
        progress: Callable[[int, int], None],
    ) -> tuple[str, ...]:
        """Encode the prompts of `calls`, which give the arguments of the pipeline's call for each batch.

        Returns the `encoders`: without them, `replayed` does what the pipeline does with them. There are none for a
        pipeline without `encode_prompt`.
        """
        found = self.encoders
        if found is None:
            used: dict[str, set[bool]] = {}
            for number, call in enumerate(calls):
                self._encode(pipe, component, number, call(), used)
                progress(number + 1, len(calls))
            found = tuple(name for name, inside in used.items() if inside == {True})
            write_text(self._folder / _ENCODERS, json.dumps(found) + "\n")
        return found

    def _encode(
        self, pipe: Any, component: str, number: int, call: Mapping[str, Any], used: dict[str, set[bool]]
    ) -> None:
        outputs: list[Any] = []
        encode, inside = getattr(pipe, "encode_prompt", None), [False]

        def recording(*args: Any, **kwargs: Any) -> Any:
            inside[0] = True
            try:
                outputs.append(encode(*args, **kwargs))  # type: ignore[misc]  # wrapped where there is one only
            finally:
                inside[0] = False
            return outputs[-1]

        def reached(_: nn.Module, __: Any) -> None:
            raise _Reached

        with ExitStack() as stack, torch.no_grad():
            for name, part in _modules(pipe).items():
                hook = reached if name == component else _noting(used.setdefault(name, set()), inside)
                stack.callback(part.register_forward_pre_hook(hook).remove)
            if encode is not None:
                stack.enter_context(_with_encode_prompt(pipe, recording))
            with suppress(_Reached):
                pipe(**call)
        content = io.BytesIO()
        torch.save(pytree.tree_map_only(torch.Tensor, _stored, outputs), content)
        write_bytes(self._file(number), content.getvalue())

    @contextmanager
    def replayed(self, pipe: Any, number: int) -> Iterator[None]:
        """While this is open, `encode_prompt` of `pipe` gives what it gave for batch `number`, call by call."""
        outputs = iter(torch.load(self._file(number), weights_only=True))

        def replay(*_: Any, **__: Any) -> Any:
            device = pipe._execution_device
            return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), next(outputs))

        with _with_encode_prompt(pipe, replay) if hasattr(pipe, "encode_prompt") else ExitStack():
            yield

    def _file(self, number: int) -> Path:
        return self._folder / f"prompts-{number}.pt"


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _noting(seen: set[bool], inside: list[bool]) -> Callable[..., None]:
    def note(_: nn.Module, __: Any) -> None:
        seen.add(inside[0])

    return note


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()  # a view would bring all of its storage along


@contextmanager
def _with_encode_prompt(pipe: Any, function: Callable[..., Any]) -> Iterator[None]:
    pipe.encode_prompt = function
    try:
        yield
    finally:
        del pipe.encode_prompt
