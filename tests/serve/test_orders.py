"""The door of requests: what is an order, and what is told of everything else."""

from __future__ import annotations

import msgspec
import pytest

from diffc.errors import UsageError
from diffc.serve.orders import Order, parse_order


def test_an_order_is_read_with_its_defaults() -> None:
    assert parse_order(b'{"prompt": "a fox", "seed": 7}') == Order("a fox", seed=7)
    whole = Order("a fox", 1, 4, 64, 96, 3.5)
    assert parse_order(msgspec.json.encode(whole)) == whole
    assert whole.settings == (4, 64, 96, 3.5)
    assert whole.settings == Order("another", 2, 4, 64, 96, 3.5).settings


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "not an order"),
        (b"[]", "not an order"),
        (b'{"seed": 7}', "prompt"),
        (b'{"prompt": ""}', "length >= 1"),
        (b'{"prompt": "a", "seed": -1}', "seed"),
        (b'{"prompt": "a", "steps": 100000}', "steps"),
        (b'{"prompt": "a", "height": 0}', "height"),
        (b'{"prompt": "a", "guidance": "x"}', "guidance"),
        (b'{"prompt": "a", "lora": "x"}', "lora"),
        (b'{"prompt": "' + b"a" * 70000 + b'"}', "70014 bytes"),
        (b"\xff\xfe", "not an order"),
    ],
)
def test_anything_else_is_named(body: bytes, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_order(body)
