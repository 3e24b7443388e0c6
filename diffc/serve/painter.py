"""Paints orders with an artifact in its diffusers pipeline, several at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffc.artifact.folder import Artifact
from diffc.commands.generate import usual_size
from diffc.commands.pipeline_of import pipeline_around, pipeline_source
from diffc.errors import DiffcError, UsageError
from diffc.models.call import plain_sizes, text_cleaner
from diffc.models.spec import Shape
from diffc.paths import AnyPath, as_path
from diffc.runtime.load import load, resolve
from diffc.serve.orders import Order

Picture = npt.NDArray[np.uint8]
"""[rows, columns, 3]."""


class Painter:
    """A pipeline with a compiled backbone, held open. One call of `paint` at a time.

    Every order has its own noise, drawn from its seed on the CPU, so a picture is the same in whatever company it is
    painted, up to how the runtime's kernels round at another batch. `fill`: a call is filled up to `max_batch` with
    copies of its last order, so that all calls have one shape and rounding is the same, too; it costs the time of a
    full batch at every call.
    """

    def __init__(
        self,
        artifact: AnyPath,
        *,
        pipeline: str | None = None,
        target: str | None = None,
        max_batch: int = 4,
        fill: bool = False,
    ):
        """Raises DiffcError where the artifact does not run here, or its pipeline is not there."""
        if max_batch < 1:
            raise UsageError(f"max_batch is {max_batch}", fix="give 1 or more")
        self._artifact = Artifact.load(as_path(artifact).absolute())
        self._source = pipeline_source(self._artifact, pipeline)
        self._max_batch, self._fill = max_batch, fill
        _, device = resolve(self._artifact, target)
        self._pipe = pipeline_around(
            self._source, self._artifact, device, lambda *_: None, with_backbone=False
        )
        self._module = load(self._artifact.folder, target=target, device=device, dtype=self._pipe.vae.dtype)
        setattr(self._pipe, self._source.family.component, self._module)
        self._parameters = signature(self._pipe.__call__).parameters
        painted = getattr(self._pipe.vae.config, "sample_size", None)
        self._size = usual_size(self._artifact.manifest, painted)

    def check(self, order: Order) -> None:
        """Raise UsageError for a size that the backbone does not take."""
        height, width = self._sizes(order)
        self._source.family.check(self._source.config, Shape(1, height, width, 1))

    def paint(self, orders: Sequence[Order]) -> list[Picture]:
        """The pictures, in the order of `orders`. Those with equal settings are painted together.

        Raises DiffcError when an order does not fit the artifact, or the runtime fails.
        """
        pictures = []
        for answer in self.answers(orders):
            if isinstance(answer, DiffcError):
                raise answer
            pictures.append(answer)
        return pictures

    def answers(self, orders: Sequence[Order]) -> list[Picture | DiffcError]:
        """As `paint`, with the error in the place of the pictures that were to be painted in one call."""
        found: dict[int, Picture | DiffcError] = {}
        for together in self._batches(orders):
            try:
                pictures: Sequence[Picture | DiffcError] = self._painted([orders[n] for n in together])
            except DiffcError as error:
                pictures = [error] * len(together)
            found |= dict(zip(together, pictures, strict=True))
        return [found[n] for n in range(len(orders))]

    def close(self) -> None:
        """Free the compiled backbone."""
        self._module.close()

    def _batches(self, orders: Sequence[Order]) -> Iterator[list[int]]:
        """Places of orders with equal settings, at most `max_batch` at a time."""

        def by(n: int) -> str:
            return repr(orders[n].settings)

        for _, group in groupby(sorted(range(len(orders)), key=by), by):
            places = list(group)
            yield from (places[n : n + self._max_batch] for n in range(0, len(places), self._max_batch))

    def _painted(self, orders: Sequence[Order]) -> list[Picture]:
        first, count = orders[0], len(orders)
        filled = [*orders, *[orders[-1]] * (self._max_batch - count if self._fill else 0)]
        height, width = self._sizes(first)
        guidance = {} if first.guidance is None else {"guidance_scale": first.guidance}
        self._module.start(first.steps)
        with text_cleaner(type(self._pipe)):
            result: Any = self._pipe(
                prompt=[order.prompt for order in filled],
                num_inference_steps=first.steps,
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(order.seed) for order in filled],
                output_type="np",
                **plain_sizes(self._parameters),
                **guidance,
            )
        images = result.images[:count]
        if not np.isfinite(images).all():
            raise DiffcError("the backbone painted NaN", fix="compile again with --dtype bfloat16 or float32")
        return list((images * 255).round().astype(np.uint8))

    def _sizes(self, order: Order) -> tuple[int, int]:
        return order.height or self._size[0], order.width or self._size[1]
