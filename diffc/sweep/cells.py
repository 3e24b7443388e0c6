"""The cells of a sweep: every combination of the values on its axes, each with a name that stays."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from diffc.backends.sm import parse_sm
from diffc.compile.request import CompileRequest, dtype_name
from diffc.errors import UsageError, unknown_value
from diffc.models.sources.lora_files import parse_lora
from diffc.quantize.formats import format_name
from passes.files.contained import safe_name

NONE = "none"
"""The value of --cache-plan and --lora for a cell without one."""
AXES = ("model", "format", "sm", "cache-plan", "lora", "dtype")
_CONDITION = re.compile(rf"(?:^|,)\s*({'|'.join(AXES)})=")
_EXCLUDE = "write AXIS=VALUE,AXIS=VALUE, such as format=fp8,sm=89|120; axes: " + ", ".join(AXES)


@dataclass(frozen=True)
class Cell:
    """One compile of a sweep. `sm` None builds no engine; `cache_plan` empty and `loras` () have none.

    `dtype` is that of the request, "auto" for the type of the stored weights.
    """

    model: str
    format: str
    sm: int | None = None
    cache_plan: str = ""
    loras: tuple[str, ...] = ()
    dtype: str = "auto"

    @property
    def name(self) -> str:
        """The name of the cell and of its folder: the same in every sweep that has this cell."""
        parts = [_short(self.model), self.format, *([] if self.sm is None else [f"sm{self.sm}"])]
        parts += [_short(text) for text in (self.cache_plan, *self.loras) if text]
        parts += [] if self.dtype == "auto" else [self.dtype]
        plain = safe_name("-".join(parts), 80)
        texts = [text for text in (self.model, self.cache_plan, *self.loras) if text]
        if all(_short(text) == text for text in texts):
            return plain
        # Two texts can have one short form, so the name ends in a hash of them.
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:6]
        return f"{plain}-{digest}"

    def values(self) -> dict[str, str]:
        """The place of the cell on every axis, as it is written on the command line."""
        return {
            "model": self.model,
            "format": self.format,
            "sm": NONE if self.sm is None else str(self.sm),
            "cache-plan": self.cache_plan or NONE,
            "lora": " + ".join(self.loras) or NONE,
            "dtype": self.dtype,
        }

    def request(self, base: CompileRequest, folder: Path) -> CompileRequest:
        """`base` for this cell, whose artifact lies in `folder`."""
        return replace(
            base,
            model=self.model,
            output=folder / self.name,
            format=self.format,
            sms=() if self.sm is None else (self.sm,),
            cache_plan=self.cache_plan,
            loras=tuple(map(parse_lora, self.loras)),
            dtype=self.dtype,
        )


def _short(text: str) -> str:
    """The last part of a path or an id of the hub, in letters that every system takes in a file's name."""
    name = PurePath(text.replace("\\", "/")).name
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip(".-") or "model"


@dataclass(frozen=True)
class Axes:
    """The values on every axis, as they are written on the command line."""

    models: Sequence[str]
    formats: Sequence[str] = ("auto",)
    sms: Sequence[str] = ()
    cache_plans: Sequence[str] = (NONE,)
    loras: Sequence[str] = (NONE,)
    dtypes: Sequence[str] = ("auto",)

    def cells(self, exclude: Sequence[str] = ()) -> list[Cell]:
        """Every combination, in the order of the axes, without those that an `exclude` fits.

        Raises UsageError for a value that is none, and when nothing is left.
        """
        left_out = [_condition(text) for text in exclude]
        cells = [cell for cell in self._all() if not any(_fits(cell, c) for c in left_out)]
        if not cells:
            raise UsageError(
                "the sweep has no cell", fix="give --model and --format, and less under --exclude"
            )
        return cells

    def _all(self) -> Iterator[Cell]:
        sms: list[int | None] = [parse_sm(text) for text in self.sms]
        loras = [() if text == NONE else tuple(re.split(r"\s+\+\s+", text.strip())) for text in self.loras]
        plans = ["" if text == NONE else text for text in self.cache_plans]
        formats, dtypes = [format_name(f) for f in self.formats], [dtype_name(d) for d in self.dtypes]
        # SMs last: cells that differ in these alone are one piece of work.
        every = itertools.product(self.models, dtypes, formats, loras, plans, sms or [None])
        cells = (Cell(model, format, sm, plan, lora, dtype) for model, dtype, format, lora, plan, sm in every)
        yield from dict.fromkeys(cells)

    def described(self) -> dict[str, list[str]]:
        """The values by the axes' names, as sweep.json has them."""
        values = (self.models, self.formats, self.sms, self.cache_plans, self.loras, self.dtypes)
        return {name.replace("-", "_"): list(each) for name, each in zip(AXES, values, strict=True)}


def _condition(text: str) -> dict[str, list[str]]:
    """Axis -> patterns of "model=tiny-*,sm=89|120". Raises UsageError for another form."""
    found = list(_CONDITION.finditer(text))
    if not found or found[0].start() != 0:
        name = text.partition("=")[0]
        if "=" in text and name not in AXES:
            raise unknown_value("axis of --exclude", name, AXES, fix=_EXCLUDE)
        raise UsageError(f"--exclude is {text!r}", fix=_EXCLUDE)
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {match[1]: text[match.end() : end].split("|") for match, end in zip(found, ends, strict=True)}


def _fits(cell: Cell, condition: dict[str, list[str]]) -> bool:
    values = cell.values()
    return all(
        any(fnmatchcase(values[axis], pattern.strip()) for pattern in patterns)
        for axis, patterns in condition.items()
    )
