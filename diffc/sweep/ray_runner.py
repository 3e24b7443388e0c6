"""Jobs on the workers of Ray: of this machine, where none other is named, or of a cluster."""

from __future__ import annotations

import os
import socket
import time
from importlib.util import find_spec
from typing import Any

from diffc.backends.install import install_command
from diffc.errors import DiffcError
from diffc.sweep.runners import lost
from diffc.sweep.worker import Attempt, attempt

_OBJECTS = 80 << 20
"""Bytes of Ray's object store: jobs and rows have kilobytes."""
_ANSWER = 10.0
"""Seconds that a cluster may take to answer."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What a worker had started dies with it (Linux); elsewhere its process sees that the worker is gone.
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # as a compile by itself; Ray's own is 15
}


def check_ray(address: str) -> None:
    """Raise DiffcError where Ray is not installed, or nothing answers at `address`, which Ray waits for for minutes."""
    if find_spec("ray") is None:
        raise DiffcError(
            "diffc sweep needs Ray, which is not installed",
            fix=f"{install_command('sweep')}, or --runner processes on this machine alone",
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # none, or a word of Ray's, such as auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, ValueError, OverflowError) as error:
        raise DiffcError(
            f"nothing answers at --address {address}: {error}",
            fix="give the address that `ray start --head` has printed, HOST:PORT",
        ) from error


class RayRunner:
    """Workers of Ray at `address`; without one, `workers` of this machine that hold `memory` bytes together."""

    def __init__(self, address: str, workers: int, memory: int, threads: int, logs: str) -> None:
        """Connect, or start Ray here. Raises DiffcError where that fails."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import ray

        self._ray, self._threads, self._logs = ray, threads, logs
        here: dict[str, Any] = {
            "num_cpus": workers,
            "num_gpus": None,
            "_memory": memory,
            "object_store_memory": _OBJECTS,
            "include_dashboard": False,
        }
        settings: dict[str, Any] = {"address": address} if address else {"address": "local", **here}
        try:
            ray.init(logging_level="error", log_to_driver=False, configure_logging=False, **settings)
        except Exception as error:  # Ray has no class of its own for what can fail here
            place = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise DiffcError(
                f"cannot reach {place}: {type(error).__name__}: {str(error)[:500]}",
                fix="check --address and `ray status`, or give --runner processes",
            ) from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.largest = int(max((node.get("memory", 0) for node in nodes if node.get("CPU")), default=0))
        self.workers = int(sum(node.get("CPU", 0) for node in nodes))
        self._function = ray.remote(max_retries=0, num_cpus=1)(attempt)
        self._names: dict[Any, str] = {}

    def submit(self, name: str, payload: bytes, needs: int) -> None:
        """Take a job; one that needs more than any machine has gets the largest for itself."""
        options = self._function.options(memory=min(needs, self.largest), name=name)
        self._names[options.remote(payload, self._threads, self._logs)] = name

    def finished(self, timeout: float) -> list[tuple[str, Attempt]]:
        """The jobs that have ended; a worker that is gone is an Attempt that says so."""
        if not self._names:
            time.sleep(timeout)
            return []
        done, _ = self._ray.wait(list(self._names), num_returns=1, timeout=timeout)
        return [(self._names.pop(each), self._outcome(each)) for each in done]

    def _outcome(self, job: Any) -> Attempt:
        try:
            found: Attempt = self._ray.get(job)
        except self._ray.exceptions.RayError as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return lost(f"{type(error).__name__}: {first[:300]}")
        return found

    def close(self) -> None:
        """End what is running; a cluster stays as it is."""
        for job in list(self._names):
            self._ray.cancel(job, force=True)
        self._ray.shutdown()
