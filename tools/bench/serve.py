"""Load on a Ray Serve application of this machine: latencies, a killed replica, pictures that must not change.

    python -m tools.bench.serve ARTIFACT --requests 500 --clients 8 --kill-at 200

Starts Ray with `diffc.serve.app`, sends orders from clients at once, kills -9 the replica that answered last when
`--kill-at` answers are there, and compares every picture with that of a painter of its own that gets one order at a
time. Exits with 1 where an order has no answer, or a picture is further off than `--tolerance`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffc.models.embedded.digits import WORDS
from diffc.serve.client import Answer, paint
from diffc.serve.orders import Order
from diffc.serve.painter import Painter, Picture


@dataclass
class Load:
    """Answers by number of the order, and what happened meanwhile."""

    kill_at: int
    answers: dict[int, Answer] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    killed: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, number: int, answer: Answer) -> None:
        """Keep an answer; the one at `kill_at` costs the replica that gave it its life."""
        with self.lock:
            self.answers[number] = answer
            if self.killed is None and 0 < self.kill_at <= len(self.answers):
                self.killed = int(answer.headers["x-diffc-replica"])
                os.kill(self.killed, signal.SIGKILL)


def orders(count: int, steps: int) -> list[Order]:
    """Orders of digits, each with a seed of its own."""
    return [Order(f"a handwritten {WORDS[n % 10]}", seed=n, steps=steps) for n in range(count)]


def send(url: str, asked: Sequence[Order], clients: int, kill_at: int) -> tuple[Load, float]:
    """All orders from `clients` threads, each of which sends its next order after an answer; and the seconds."""
    load = Load(kill_at)

    def one(number: int) -> None:
        try:
            load.take(number, paint(url, asked[number], tries=20))
        except Exception as error:  # whatever kept an order from its answer is counted
            load.failures.append(f"order {number}: {error}")

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(len(asked))))
    return load, time.perf_counter() - started


def compared(load: Load, asked: Sequence[Order], painter: Painter, every: int) -> Iterator[int]:
    """The largest difference, in 1/255, of every `every`-th picture from one that is painted alone."""
    for number in sorted(load.answers)[::every]:
        got: Picture = np.asarray(Image.open(io.BytesIO(load.answers[number].png)))
        (want,) = painter.paint([asked[number]])
        yield int(np.abs(got.astype(int) - want.astype(int)).max())


def figures(load: Load, seconds: float, differences: Sequence[int]) -> dict[str, Any]:
    """What is told of a run."""
    times = np.array([answer.seconds for answer in load.answers.values()])
    shares = np.percentile(times, [50, 95, 99]) if len(times) else np.zeros(3)
    return {
        "answered": len(load.answers),
        "failed": load.failures,
        "sent again": sum(answer.sent > 1 for answer in load.answers.values()),
        "killed": load.killed,
        "replicas": dict(Counter(a.headers["x-diffc-replica"] for a in load.answers.values())),
        "seconds": round(seconds, 1),
        "per second": round(len(times) / seconds, 2),
        "latency": dict(zip(("p50", "p95", "p99"), (round(float(s), 2) for s in shares), strict=True)),
        "compared": len(differences),
        "equal": sum(d == 0 for d in differences),
        "largest difference": max(differences, default=0),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load. Exit code 0 when every order has its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--kill-at", type=int, default=200, help="answers after which a replica is killed; 0: none"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--replicas", type=int, nargs=2, default=(1, 2), metavar=("LEAST", "MOST"))
    parser.add_argument("--fill", action="store_true", help="every call has the same shapes")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--every", type=int, default=1, help="compare every N-th picture")
    parser.add_argument("--tolerance", type=int, default=2, help="in 1/255 of a pixel")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)

    import ray
    from ray import serve

    from diffc.serve.app import Settings, build

    settings = Settings(
        artifact=str(given.artifact),
        max_batch=given.max_batch,
        fill=given.fill,
        min_replicas=given.replicas[0],
        max_replicas=given.replicas[1],
    )
    asked = orders(given.requests, given.steps)
    ray.init(num_cpus=given.replicas[1], include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": given.port})
        serve.run(build(settings), name="paint", route_prefix="/")
        load, seconds = send(f"http://127.0.0.1:{given.port}/", asked, given.clients, given.kill_at)
        serve.shutdown()
    finally:
        ray.shutdown()
    painter = Painter(given.artifact, max_batch=given.max_batch, fill=given.fill)
    found = figures(load, seconds, list(compared(load, asked, painter, given.every)))
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    whole = found["answered"] == given.requests and found["largest difference"] <= given.tolerance
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
