"""Whether this machine has an NVIDIA GPU, which some builds need."""

from __future__ import annotations

from diffc.errors import UnsupportedError


def has_device() -> bool:
    """Whether this machine has an NVIDIA GPU and its driver."""
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount()) > 0
    except pynvml.NVMLError:
        return False


def check_stripping() -> None:
    """Raise UnsupportedError where the builder cannot leave weights out: it asks the driver, measured with 1.7.1."""
    if not has_device():
        raise UnsupportedError(
            "an engine without its weights is built with an NVIDIA driver at hand, and this machine has none",
            fix="leave out --strip-weights, or build on the machine that has the GPU",
        )
