"""The builder's process, however the conversation with it ends. Needs no TensorRT."""

from __future__ import annotations

import tempfile
import threading

import pytest

from diffc.backends.tensorrt.process import events, worker

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def test_a_worker_that_is_dead_before_it_is_asked_ends_the_conversation() -> None:
    with tempfile.TemporaryFile() as log, worker(log) as process:
        process.kill()
        process.wait()
        assert not list(events(process, {"module": "never read"}))


@pytest.mark.parametrize("head_start", [0.0, 0.0005, 0.002])
def test_ctrl_c_while_the_worker_is_asked_raises_that_and_nothing_else(head_start: float) -> None:
    """The request is written by a thread; Ctrl-C closes the pipe under it."""

    asking: list[threading.Thread] = []

    def interrupted() -> None:
        with tempfile.TemporaryFile() as log, worker(log) as process:
            question = events(process, {"module": "x" * 100_000})
            asking.append(threading.Thread(target=next, args=(question, None), daemon=True))
            asking[-1].start()
            asking[-1].join(head_start)
            raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    for thread in asking:
        thread.join(10)
        assert not thread.is_alive()
