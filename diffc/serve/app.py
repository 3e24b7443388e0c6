"""A Ray Serve application that paints: `serve run diffc.serve.app:build artifact=ARTIFACT`.

POST / with the JSON of an `Order` gives a PNG, or a text that says what is wrong with the order (400). Replicas are
started and stopped by load, each with the artifact open; requests that arrive together are painted together. A replica
that dies is replaced, and the requests that it held fail: the same order may be sent again, which
`diffc.serve.client` does.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from diffc.errors import DiffcError, UsageError
from diffc.serve.orders import Order, parse_order
from diffc.serve.painter import Painter, Picture

REPLICA = "x-diffc-replica"
"""The header that says which process painted."""


class Settings(BaseModel):
    """What `serve run` takes as NAME=VALUE.

    `max_batch`: pictures of one call; of an engine, with guidance twice as many must fit its profile. `wait_seconds`:
    how long a request waits for others. `fill`: as `diffc.serve.painter.Painter`. `ongoing`: requests that a replica
    should have at a time, from which the number of replicas follows. `cpus` and `gpus` are those of one replica.
    """

    model_config = ConfigDict(extra="forbid")

    artifact: str
    pipeline: str | None = None
    target: str | None = None
    max_batch: int = Field(4, ge=1)
    wait_seconds: float = Field(0.02, ge=0)
    fill: bool = False
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    ongoing: float = Field(4.0, gt=0)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)


class Paint:
    """One replica: an artifact in its pipeline, and the queue of orders before it."""

    def __init__(self, settings: Settings):
        """Open the artifact. Raises DiffcError where it does not run on this node."""
        self._painter = Painter(
            settings.artifact,
            pipeline=settings.pipeline,
            target=settings.target,
            max_batch=settings.max_batch,
            fill=settings.fill,
        )
        self._painter.paint([Order("a", steps=1)])  # the first run of a runtime also allocates and compiles
        self._together.set_max_batch_size(settings.max_batch)
        self._together.set_batch_wait_timeout_s(settings.wait_seconds)

    async def __call__(self, request: Request) -> Response:
        """The picture of an order as PNG, or what is wrong with the order."""
        try:
            return Response(
                await self.paint(parse_order(await request.body())), 200, self._header, "image/png"
            )
        except DiffcError as error:
            return Response(str(error), 400, self._header, "text/plain")

    async def paint(self, order: Order) -> bytes:
        """The picture of an order as PNG; for callers that have a handle. Raises DiffcError for what does not fit."""
        self._painter.check(order)
        found: bytes | DiffcError = await self._together(order)
        if isinstance(found, DiffcError):
            raise found
        return found

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.02)  # type: ignore[untyped-decorator]  # Ray is untyped
    async def _together(self, orders: Sequence[Order]) -> list[bytes | DiffcError]:
        answers = await asyncio.to_thread(self._painter.answers, orders)
        return [answer if isinstance(answer, DiffcError) else png(answer) for answer in answers]

    def check_health(self) -> None:
        """Ray Serve asks this again and again, and replaces a replica that raises or does not answer."""
        self._painter.check(Order("a", steps=1))

    @property
    def _header(self) -> dict[str, str]:
        return {REPLICA: str(os.getpid())}


def png(picture: Picture) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def build(given: Settings | Mapping[str, Any]) -> serve.Application:
    """The application for these settings; `serve run diffc.serve.app:build artifact=ARTIFACT` calls it with texts.

    Raises UsageError that names the setting which is unknown or has no such value.
    """
    try:
        settings = given if isinstance(given, Settings) else Settings.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            fix=f"give {', '.join(Settings.model_fields)}",
        ) from error
    absolute = settings.model_copy(update={"artifact": str(Path(settings.artifact).expanduser().absolute())})
    deployment = serve.deployment(
        Paint,
        max_ongoing_requests=2 * settings.max_batch,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": max(settings.min_replicas, settings.max_replicas),
            "target_ongoing_requests": settings.ongoing,
            "upscale_delay_s": 3,
            "downscale_delay_s": 60,
        },
        health_check_period_s=5,
        health_check_timeout_s=60,
    )
    return deployment.bind(absolute)
