"""The results of `tools.compat` as data: from verdicts to the stored table, its differences, and rows to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffc.backends.onnx_graph import element_types
from diffc.backends.sm import KNOWN_SMS
from diffc.backends.target import TARGETS
from tools.compat.net import NAMES
from tools.compat.probes import Probe
from tools.compat.run import Runtime

Table = dict[str, Any]
"""`versions` of what was probed, `min_sm` by onnx.TensorProto type, `probes` by name: `types` that are in the
model, and per runtime "verdict -> columns" and "figures"."""

_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_DATATYPES = "HW-specific datatypes"


def entry(runtime: Runtime, said: Mapping[str, str]) -> dict[str, Any]:
    """What one runtime said about one probe: columns by verdict, and figures by name."""
    verdicts: dict[str, list[str]] = {}
    for column in runtime.columns:
        verdicts.setdefault(said.get(column, "crash: no verdict"), []).append(column)
    figures = {name: value for name, value in said.items() if name not in runtime.columns}
    joined = {verdict: " ".join(columns) for verdict, columns in verdicts.items()}
    return {"verdicts": joined} | ({"figures": figures} if figures else {})


def merge(
    stored: Table, probes: Iterable[Probe], versions: Mapping[str, str], new: Mapping[str, Any]
) -> Table:
    """The stored table with new entries (by probe, then target) for the runtimes that are here."""
    merged: Table = {"versions": {**stored.get("versions", {}), **versions}, "min_sm": {}, "probes": {}}
    for probe in probes:
        kept = {k: v for k, v in stored.get("probes", {}).get(probe.name, {}).items() if k in TARGETS}
        types = sorted(int(t) for t in element_types(probe.net().model()))
        merged["probes"][probe.name] = {"types": types, **kept, **new[probe.name]}
    merged["min_sm"] = min_sm(merged["probes"])
    return merged


def min_sm(probes: Mapping[str, Any]) -> dict[str, int | None]:
    """The oldest SM that builds any model with that onnx.TensorProto type; None where none does."""
    oldest: dict[str, int | None] = {}
    for probe in probes.values():
        if "trt-rtx" not in probe:
            continue
        taken = [int(c.removeprefix("sm")) for c in probe["trt-rtx"]["verdicts"].get("ok", "").split()]
        for kind in map(str, probe["types"]):
            known = [sm for sm in (*taken, oldest.get(kind)) if sm is not None]
            oldest[kind] = min(known, default=None)
    return dict(sorted(oldest.items(), key=lambda item: int(item[0])))


def dump(table: Table) -> str:
    """The table as JSON, one probe per line, so that a difference reads well."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table["probes"].items()]
    head = json.dumps({"versions": table["versions"], "min_sm": table["min_sm"]}, indent=1)
    return head.removesuffix("\n}") + ',\n "probes": {\n' + ",\n".join(lines) + "\n }\n}\n"


def load(path: Path) -> Table:
    """The stored table; an empty one where there is no file."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def differences(before: Table, after: Table, names: Iterable[str], targets: Iterable[str]) -> Iterator[str]:
    """What two tables say differently about these probes and targets, a line each."""
    targets = list(targets)
    for name in names:
        for target in targets:
            old, new = (t.get("probes", {}).get(name, {}).get(target) for t in (before, after))
            if old is None or new is None:
                yield f"{name}: {target}: {'not stored' if old is None else 'not probed'}"
                continue
            was, now = _by_column(old), _by_column(new)
            for column in (c for c in was if c in now and was[c] != now[c]):  # a new provider is no change
                yield f"{name}: {target} {column}: {was[column]} -> {now[column]}"
            yield from _figure_differences(
                f"{name}: {target}", old.get("figures", {}), new.get("figures", {})
            )


def _by_column(found: Mapping[str, Any]) -> dict[str, str]:
    return {column: verdict for verdict, columns in found["verdicts"].items() for column in columns.split()}


def _figure_differences(where: str, was: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Figures that moved: more than half a bit of a weight, more than one power of ten of a distance."""
    for name in ("bits", "distance"):
        if name not in was and name not in now:
            continue
        a, b = float(was.get(name, "nan")), float(now.get(name, "nan"))
        same = (
            abs(a - b) <= 0.5 if name == "bits" else max(a, 1e-6) <= 11 * max(b, 1e-6) <= 121 * max(a, 1e-6)
        )
        if not same:
            yield f"{where} {name}: {was.get(name)} -> {now.get(name)}"


@dataclass(frozen=True)
class Row:
    """Probes that differ only in the compute type, as text: what was probed, a cell per target, and why not."""

    section: str
    name: str
    shows: str
    cells: dict[str, str]
    why: str


def rows(probes: Iterable[Probe], table: Table) -> list[Row]:
    """The probes as rows, grouped over compute types, in their order."""
    groups: dict[str, list[Probe]] = {}
    for probe in probes:
        hp = probe.options.get("hp")
        parts = [part for part in probe.name.split(", ") if hp is None or part != NAMES[hp]]
        groups.setdefault(f"{probe.section}\0{', '.join(parts)}", []).append(probe)
    return [_row(key.split("\0")[1], group, table) for key, group in groups.items()]


def _row(name: str, group: list[Probe], table: Table) -> Row:
    targets = [t for t in TARGETS if any(t in table["probes"].get(p.name, {}) for p in group)]
    cells, reasons = {}, []
    for target in targets:
        words: dict[str, list[str]] = {}
        for probe in group:
            found = table["probes"][probe.name].get(target)
            if found:
                hp = probe.options.get("hp")
                words.setdefault(_word(found), []).append(_SHORT[NAMES[hp]] if hp else "")
                reasons += [v for v in found["verdicts"] if v != "ok" and _DATATYPES not in v]
        single = len(words) == 1
        cells[target] = "; ".join(w if single else f"{', '.join(hps)} {w}" for w, hps in words.items())
    return Row(group[0].section, name, group[0].shows, cells, "; ".join(dict.fromkeys(reasons)))


def _word(found: Mapping[str, Any]) -> str:
    """Where it is taken, in a word or two, with the figures."""
    taken = found["verdicts"].get("ok", "").split()
    every = list(_by_column(found))
    figures = found.get("figures", {})
    if every and every[0].startswith("sm"):
        word = _sms([int(c.removeprefix("sm")) for c in taken])
        return word + (f" ({figures['bits']} bits)" if "bits" in figures else "")
    missing = [c for c in every if c not in taken]
    word = "yes" if not missing else "no" if not taken else f"not {', '.join(missing)}"
    return f"{word} ({figures['distance']})" if "distance" in figures else word


def _sms(taken: list[int]) -> str:
    if not taken:
        return "no"
    if taken == list(KNOWN_SMS):
        return "all"
    if taken == [sm for sm in KNOWN_SMS if sm >= taken[0]]:
        return f"SM{taken[0]}+"
    return "only " + ", ".join(f"SM{sm}" for sm in taken)
