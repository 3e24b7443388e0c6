"""What a client asks for, and the door that every request comes through."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from diffc.errors import UsageError
from diffc.records import Count, Positive

_LARGEST = 1 << 16
"""Bytes of a request; a prompt has a few hundred."""


class Order(Struct, frozen=True, forbid_unknown_fields=True):
    """A picture: the prompt, the seed of its noise, denoising steps, pixels, guidance; None leaves it to the pipeline.

    The same order gives the same picture (docs/serving.md says to which tolerance), so it may be sent again.
    """

    prompt: Annotated[str, Meta(min_length=1, max_length=4000)]
    seed: Count = 0
    steps: Annotated[int, Meta(ge=1, le=200)] = 8
    height: Positive | None = None
    width: Positive | None = None
    guidance: Annotated[float, Meta(ge=0, le=100)] | None = None

    @property
    def settings(self) -> tuple[object, ...]:
        """What orders of one batch have in common."""
        return self.steps, self.height, self.width, self.guidance


def parse_order(body: bytes) -> Order:
    """The order in the body of a request. Raises UsageError that names what is wrong with it."""
    if len(body) > _LARGEST:
        raise UsageError(f"the request has {len(body)} bytes", fix=f"send at most {_LARGEST}")
    try:
        return msgspec.json.decode(body, type=Order)
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"the request is not an order: {error}",
            fix='send JSON such as {"prompt": "a red fox", "seed": 7}',
        ) from error
