"""Probes what the installed compilers and runtimes take: operators, types, opsets, domains, forms of quantization.

    python -m tools.compat [--only PATTERN] [--write | --check]

Each probe is a small network. TensorRT-RTX parses it and builds it for every compute capability, on a machine
without a GPU; TensorRT where there is one; ONNX Runtime loads and runs it with every provider, and the results are
compared with onnx.reference. Everything runs in child processes, so that a crash is a verdict like any other.
--write puts the table into tools/compat/compat.json, where tests hold diffc's refusals against it, and into
docs/compat.md. --check compares with what is stored and exits with 1 when a new release behaves differently.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.progress import track
from rich.table import Table as Grid

from diffc.backends.target import TARGETS
from tools.compat import table as compat_table
from tools.compat.catalogue import all_probes
from tools.compat.probes import Probe
from tools.compat.run import Job, Runtime, installed, run_all

STORED = Path(__file__).with_name("compat.json")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "compat.md"
TITLES = {"trt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT", "ort": "ONNX Runtime"}


def main() -> int:
    """Probe, print, then write or check; 1 when something differs, 2 when there is nothing to probe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="probes whose section and name hold this (* is anything)")
    parser.add_argument("--write", action="store_true", help="store the table")
    parser.add_argument("--check", action="store_true", help="compare with the stored table")
    wanted = parser.parse_args()
    if wanted.write and wanted.only:
        parser.error("--write stores the whole table: leave out --only")
    probes = chosen(wanted.only)
    runtimes = installed()
    if not probes or not runtimes:
        print(
            f"nothing to probe: {len(probes)} probes, {len(runtimes)} compilers and runtimes", file=sys.stderr
        )
        return 2
    stored = compat_table.load(STORED)
    table = compat_table.merge(stored, probes, versions(runtimes), measure(probes, runtimes))
    if wanted.check:
        return check(stored, table, probes, runtimes)
    show(probes, table)
    if wanted.write:
        STORED.write_text(compat_table.dump(table), encoding="utf-8")
        DOCUMENT.write_text(document(probes, table), encoding="utf-8")
    return 0


def chosen(pattern: str) -> list[Probe]:
    """The probes whose section and name hold the pattern."""
    return [
        p
        for p in all_probes().values()
        if fnmatch.fnmatch(f"{p.section}: {p.name}".lower(), f"*{pattern}*".lower())
    ]


def versions(runtimes: Sequence[Runtime]) -> dict[str, str]:
    """Version by target, and that of onnx, whose reference evaluator results are compared with."""
    return {runtime.target.name: runtime.version for runtime in runtimes} | {"onnx": onnx.__version__}


def measure(probes: Sequence[Probe], runtimes: Sequence[Runtime]) -> dict[str, dict[str, Any]]:
    """What each runtime says about each probe: by probe, then target."""
    found: dict[str, dict[str, Any]] = {probe.name: {} for probe in probes}
    jobs = [job(probe) for probe in probes]
    console = Console(stderr=True)
    for runtime in runtimes:
        title = f"{TITLES[runtime.target.name]} {runtime.version}"
        answers = run_all(runtime, jobs)
        for done, said in track(answers, title, total=len(jobs), console=console, transient=True):
            found[done.name][runtime.target.name] = compat_table.entry(runtime, said)
    return found


def job(probe: Probe) -> Job:
    """The probe as its child process needs it."""
    net = probe.net()
    return Job(probe.name, net.model().SerializeToString(), net.ranges, probe.weights)


def check(
    stored: dict[str, Any], table: dict[str, Any], probes: Sequence[Probe], runtimes: Sequence[Runtime]
) -> int:
    """Print what differs from the stored table; 1 when something does."""
    for name, version in table["versions"].items():
        if stored.get("versions", {}).get(name) != version:
            print(f"version of {name}: {stored.get('versions', {}).get(name)} -> {version}")
    targets = [runtime.target.name for runtime in runtimes]
    found = list(compat_table.differences(stored, table, [p.name for p in probes], targets))
    print("\n".join([*found, f"{len(found)} differences in {len(probes)} probes"]))
    return int(bool(found))


def show(probes: Sequence[Probe], table: dict[str, Any]) -> None:
    """Print the table, a section at a time."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    found = compat_table.rows(probes, table)
    for section in dict.fromkeys(row.section for row in found):
        targets = [t for t in TARGETS if any(t in row.cells for row in found)]
        grid = Grid("probe", *(TITLES[t] for t in targets), "why not", title=section, title_justify="left")
        for row in found:
            if row.section == section:
                grid.add_row(row.name, *(row.cells.get(t, "") for t in targets), row.why)
        console.print(grid)


INTRODUCTION = """\
# What the compilers and runtimes take

Written by `python -m tools.compat --write`; `--check` says what another release does differently. Each row is a small
network of its own, made by `tools/compat/*.py`. {versions}.

- **TensorRT-RTX**: built for each compute capability without a GPU, so "all" or "SM89+" says that it builds there, not
  that it is fast. Bits are those of the whole engine per weight.
- **ONNX Runtime**: loaded and run on the CPU as diffc opens a session, once more as validation does ("cpu-exact"), and
  loaded without any option ("cpu-plain"). In brackets the relative L2 distance to `onnx.reference`, rounded up to a
  power of ten; none where one of the two has no such operator. Quantizers in float16 differ where a value lies between
  two steps: the reference evaluator divides by the scale in float16, ONNX Runtime in float32.
- f16, bf16, f32: the compute type, named where the types differ.

{types}.
"""


def document(probes: Sequence[Probe], table: dict[str, Any]) -> str:
    """The table as Markdown."""
    names = {number: onnx.TensorProto.DataType.Name(int(number)) for number in table["min_sm"]}
    types = ", ".join(f"{names[n]} {f'SM{sm}' if sm else 'none'}" for n, sm in table["min_sm"].items())
    said = ", ".join(f"{TITLES.get(name, name)} {version}" for name, version in table["versions"].items())
    types = textwrap.fill(f"Oldest compute capability that builds a model with the type: {types}", 119)
    lines = [INTRODUCTION.format(versions=said, types=types)]
    found = compat_table.rows(probes, table)
    targets = [t for t in TARGETS if any(t in row.cells for row in found)]
    for section in dict.fromkeys(row.section for row in found):
        lines += [f"## {section}", "| | " + " | ".join(TITLES[t] for t in targets) + " | why not |"]
        lines += ["|---" * (len(targets) + 2) + "|"]
        for row in (r for r in found if r.section == section):
            cells = [row.name, *(row.cells.get(t, "") for t in targets), row.why]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
