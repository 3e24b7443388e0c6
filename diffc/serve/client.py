"""A client of `diffc.serve.app` that sends an order again when the replica that held it has died."""

from __future__ import annotations

import http.client
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from diffc.errors import DiffcError
from diffc.serve.orders import Order

_PASSING = (408, 429, 500, 502, 503, 504)
"""What a server answers while a replica is replaced, or all are busy."""


@dataclass(frozen=True)
class Answer:
    """A PNG, how often the order was sent, the seconds from the first sending on, and the headers."""

    png: bytes
    sent: int
    seconds: float
    headers: Mapping[str, str]


def paint(url: str, order: Order, *, tries: int = 8, timeout: float = 120.0) -> Answer:
    """The picture of an order. An order gives the same picture whenever it is sent, so a lost one is sent again.

    `timeout` is of one try, in seconds. Raises DiffcError with what the server says of an order that it does not take,
    and with the last failure after `tries`.
    """
    body, started, said = msgspec.json.encode(order), time.perf_counter(), ""
    for sent in range(1, tries + 1):
        try:
            png, headers = _post(url, body, timeout)
            return Answer(png, sent, time.perf_counter() - started, headers)
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")[:1000]
            if error.code not in _PASSING:
                raise DiffcError(
                    f"{url} does not take the order: {said}", fix="mend the order as it says"
                ) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            said = str(error)
        time.sleep(min(5.0, 0.2 * 2**sent) * random.uniform(0.5, 1.0))
    raise DiffcError(
        f"{url} gave no picture in {tries} tries: {said}", fix="look at the server: serve status"
    )


def _post(url: str, body: bytes, timeout: float) -> tuple[bytes, Mapping[str, str]]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read(), {name.lower(): value for name, value in answer.headers.items()}
