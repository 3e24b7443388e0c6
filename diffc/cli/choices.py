"""What options can be: for completion in a shell, and for the `{formats}` and its like in help texts.

The tables are imported when they are asked for, so that other commands start without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

CALIBRATE = ("pipeline", "synthetic")
DTYPES = ("auto", "float32", "float16", "bfloat16")
CHECKS = ("structure", "numeric")
MOST = 1_000_000
"""The most that a count or a size on the command line can be: beyond it stands a slip of the finger."""


def formats() -> Iterable[str]:
    """The formats of `diffc formats`."""
    from diffc.quantize.formats import FORMATS

    return FORMATS


def targets() -> Iterable[str]:
    """What a compile can be for."""
    from diffc.backends.target import TARGETS

    return TARGETS


def sms() -> Iterable[str]:
    """The compute capabilities that engines are built for."""
    from diffc.backends.sm import KNOWN_SMS

    return map(str, KNOWN_SMS)


def collect_methods() -> Iterable[str]:
    """How the inputs of INT8 convolutions are collected."""
    from diffc.quantize.options import COLLECT_METHODS

    return COLLECT_METHODS


def weight_scales() -> Iterable[str]:
    """How the block scales of NVFP4 weights are chosen."""
    from diffc.quantize.options import WEIGHT_SCALES

    return WEIGHT_SCALES


def cache_plans() -> Iterable[str]:
    """The cache plans of `diffc cache list`."""
    from diffc.cache.presets import PRESETS

    return PRESETS


def models() -> Iterable[str]:
    """The embedded models, and the names of released ones."""
    from diffc.models.embedded.catalogue import EMBEDDED
    from diffc.models.sources.released_name import RELEASED

    return [*EMBEDDED, *RELEASED]


def all_models() -> Iterable[str]:
    """The embedded models, and the real ones that can be made with random weights."""
    from diffc.models.embedded.catalogue import EMBEDDED
    from diffc.models.embedded.real import RELEASES

    return [*EMBEDDED, *RELEASES]


def passes() -> Iterable[str]:
    """The passes of `diffc passes`."""
    from passes import all_passes

    return all_passes()


TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "formats": formats,
    "targets": targets,
    "sms": sms,
    "collect_methods": collect_methods,
    "calibrate": lambda: CALIBRATE,
    "dtypes": lambda: DTYPES,
    "checks": lambda: CHECKS,
}


def filled(text: str) -> str:
    """A help text with its `{table}` replaced by what the table holds."""
    for name, table in TABLES.items():
        if f"{{{name}}}" in text:
            text = text.replace(f"{{{name}}}", ", ".join(table()))
    return text


def completed(table: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What typer asks when a shell completes a value: the entries of `table` that begin with what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in table() if name.startswith(incomplete)]

    return complete
