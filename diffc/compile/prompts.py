"""Prompt sets: text, CSV, TSV, JSON, JSON lines and parquet files, or a folder of a data set that holds such files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from diffc.paths import AnyPath, as_path

COLUMNS = (
    "prompt",
    "prompts",
    "text",
    "caption",
    "captions",
    "en_caption",
    "caption_en",
    "description",
    "title",
)
"""Names of columns that hold prompts, in the order in which they are looked for; capitals do not matter."""


def read_prompts(path: AnyPath, limit: int | None = None) -> tuple[str, ...]:
    """The prompts of a file or of the files in a folder, in order, at most `limit`; empty ones are left out.

    A text file (any other ending) has one prompt a line. Tables have a column named as in `COLUMNS`, or a single one.
    JSON is a list of texts or objects, or an object with such a list; several captions of one picture count by their
    first. Text is UTF-8, a byte order mark is left out. Raises DiffcError for what cannot be read, or holds no prompt.
    """
    place = as_path(path)
    prompts = []
    for file in _files(place):
        for prompt in _read(file):
            if text := prompt.strip():
                prompts.append(" ".join(text.split()))
            if len(prompts) == limit:
                return tuple(prompts)
    if not prompts:
        raise DiffcError(f"{place} holds no prompt", fix="write one prompt a line")
    return tuple(prompts)


def _files(place: Path) -> list[Path]:
    """The files to read of `place`: itself, or those below it of the first kind that is there."""
    if not place.is_dir():
        return [place]
    for endings in ((".parquet",), (".jsonl",), (".csv", ".tsv"), (".json",), (".txt",)):
        found = sorted(file for file in place.rglob("*") if file.suffix.lower() in endings and file.is_file())
        named = [file for file in found if file.name not in _ABOUT]
        if named:
            return named
    raise DiffcError(
        f"{place} is a folder without prompts", fix=f"give a folder with {', '.join(_READERS)} or .txt files"
    )


_ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")
"""What describes a data set and holds none of its rows."""


def _read(file: Path) -> Iterator[str]:
    reader = _READERS.get(file.suffix.lower(), _lines)
    try:
        yield from reader(file)
    except (OSError, ValueError, csv.Error, LookupError) as error:
        raise DiffcError(
            f"cannot read the prompts file {file}: {error}",
            fix="give a UTF-8 text file with one prompt a line, or a table or JSON with a column 'prompt'",
        ) from error


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")


def _lines(file: Path) -> Iterable[str]:
    return _text(file).splitlines()


def _table(separator: str) -> Callable[[Path], Iterator[str]]:
    def read(file: Path) -> Iterator[str]:
        rows = csv.reader(io.StringIO(_text(file), newline=""), delimiter=separator)
        head = next(rows, [])
        column = head.index(_column(head))
        return (row[column] for row in rows if len(row) > column)

    return read


def _json(file: Path) -> Iterator[str]:
    content = json.loads(_text(file))
    return _prompts_of(content)


def _json_lines(file: Path) -> Iterator[str]:
    return (prompt for line in _lines(file) if line.strip() for prompt in _prompts_of([json.loads(line)]))


def _prompts_of(content: Any) -> Iterator[str]:
    if isinstance(content, Mapping):
        lists = {name: value for name, value in content.items() if isinstance(value, list)}
        content = lists[_column(list(lists))] if len(lists) != 1 else next(iter(lists.values()))
    if not isinstance(content, list):
        raise ValueError("it is no list of prompts")
    for row in content:
        value = row[_column(list(row))] if isinstance(row, Mapping) else row
        yield _one(value)


def _one(value: Any) -> str:
    """One prompt: of several captions the first; nothing of an empty cell."""
    if isinstance(value, list):
        value = value[0] if value else ""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no prompt")
    return value


def _column(names: list[str]) -> str:
    """The column of the prompts. Raises ValueError that lists the columns."""
    for known in COLUMNS:
        for name in names:
            if name.strip().lower() == known:
                return name
    if len(names) == 1:
        return names[0]
    raise ValueError(f"none of its columns is called {', '.join(COLUMNS[:4])}: {', '.join(names) or 'none'}")


def _parquet(file: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DiffcError(
            f"{file} is a parquet file, and pyarrow, which reads those, is not installed",
            fix="pip install pyarrow, or give the prompts as text, CSV or JSON",
        ) from error
    table = parquet.ParquetFile(file)
    name = _column(table.schema_arrow.names)
    for batch in table.iter_batches(columns=[name]):
        yield from map(_one, batch.column(0).to_pylist())


_READERS: Mapping[str, Callable[[Path], Iterable[str]]] = {
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
