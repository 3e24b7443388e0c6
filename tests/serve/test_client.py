"""The client sends an order again while a replica is replaced, and not when the order is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from diffc.errors import DiffcError
from diffc.serve.client import paint
from diffc.serve.orders import Order, parse_order


@contextmanager
def server(codes: list[int]) -> Iterator[tuple[str, list[Order]]]:
    """Answers with these codes in turn (0: it hangs up), and keeps the orders that came."""
    came: list[Order] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(parse_order(self.rfile.read(int(self.headers["Content-Length"]))))
            code = codes[len(came) - 1]
            if not code:
                self.connection.close()
                return
            self.send_response(code)
            self.send_header("X-Diffc-Replica", "12")
            self.end_headers()
            self.wfile.write(b"a picture" if code == 200 else b"the reason")

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/", came
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffc.serve.client.time.sleep", lambda seconds: None)


def test_a_lost_order_is_sent_again() -> None:
    order = Order("a fox", seed=3)
    with server([500, 0, 503, 200]) as (url, came):
        answer = paint(url, order)
    assert (answer.png, answer.sent, answer.headers["x-diffc-replica"]) == (b"a picture", 4, "12")
    assert came == [order] * 4


def test_a_wrong_order_is_not() -> None:
    with server([400]) as (url, came), pytest.raises(DiffcError, match="does not take the order: the reason"):
        paint(url, Order("a fox"))
    assert len(came) == 1


def test_a_server_that_stays_away_is_told() -> None:
    with server([500] * 3) as (url, _), pytest.raises(DiffcError, match="no picture in 3 tries: the reason"):
        paint(url, Order("a fox"), tries=3)
