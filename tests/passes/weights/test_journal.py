"""A journal: what it says of a file is held against the file, and a line that was cut off counts for nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from passes.base import PassError
from passes.weights import journal
from passes.weights.journal import Journal, code_version, fingerprint

CONTENT = bytes(range(256)) * 40


def written(folder: Path, *lengths: int, identity: str = "me") -> tuple[Journal, Path]:
    """A file of CONTENT, and a journal with a line at each of the lengths."""
    data, made = folder / "data", Journal(folder / "data.journal", identity)
    data.write_bytes(CONTENT)
    made.begin(data)
    for length in lengths:
        made.record(length, hashlib.sha256(CONTENT[:length]), force=True)
    return made, data


@pytest.mark.parametrize("length", [0, 99, 100, 2999, 3000, 9999, len(CONTENT)])
def test_a_file_counts_up_to_the_last_line_that_it_still_has(length: int, tmp_path: Path) -> None:
    _, data = written(tmp_path, 100, 3000, 10000)
    data.write_bytes(CONTENT[:length])
    found, digest = Journal(tmp_path / "data.journal", "me").begin(data)
    assert found == max((line for line in (0, 100, 3000, 10000) if line <= length), default=0)
    digest.update(CONTENT[found:])
    assert digest.digest() == hashlib.sha256(CONTENT).digest()  # hashing goes on from there


def test_a_byte_that_changed_counts_from_the_line_before_it(tmp_path: Path) -> None:
    _, data = written(tmp_path, 100, 3000, 10000)
    data.write_bytes(CONTENT[:500] + b"!" + CONTENT[501:])
    assert Journal(tmp_path / "data.journal", "me").begin(data)[0] == 100


def test_another_identity_starts_anew(tmp_path: Path) -> None:
    made, data = written(tmp_path, 100)
    other = Journal(made.path, "other")
    assert made.matches()
    assert not other.matches()
    assert other.begin(data)[0] == 0
    assert [json.loads(line) for line in made.path.read_text().splitlines()] == ["other"]


@pytest.mark.parametrize("end", ['[3000, "abc', "nonsense", '["a"]\n', ""])
def test_a_line_that_was_cut_off_does_not_count(end: str, tmp_path: Path) -> None:
    made, data = written(tmp_path, 100)
    with made.path.open("a", encoding="utf-8") as file:
        file.write(end)
    assert Journal(made.path, "me").begin(data)[0] == 100


def test_lines_have_some_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "EVERY", 1000)
    made, _ = written(tmp_path)
    for length in (500, 999, 1000, 1500, 2000):
        made.record(length, hashlib.sha256(CONTENT[:length]))
    assert [json.loads(line)[0] for line in made.path.read_text().splitlines()[1:]] == [1000, 2000]
    made.record(2000, hashlib.sha256(CONTENT[:2000]), force=True)  # nothing new
    assert len(made.path.read_text().splitlines()) == 3


def test_files_and_code_are_known_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"12")
    first = fingerprint(str(path))
    path.write_bytes(b"123")
    assert fingerprint(str(path)) != first
    assert first[:2] == [str(path), 2]
    with pytest.raises(PassError, match="is missing: weights cannot be read"):
        fingerprint(str(tmp_path / "gone"))
    assert code_version() == code_version()
    assert len(code_version()) == 64


@pytest.mark.parametrize(
    "end", ['["3000", "abc"]', "[3000, 7]", "[true, false]", "[" * 5000, '{"a": 1}', '[-5, ""]']
)
def test_a_line_of_something_else_does_not_count(end: str, tmp_path: Path) -> None:
    made, data = written(tmp_path, 100)
    with made.path.open("a", encoding="utf-8") as file:
        file.write(end + "\n")
    assert Journal(made.path, "me").begin(data)[0] == 100


def test_a_writer_goes_on_where_it_can_begin_a_tensor(tmp_path: Path) -> None:
    """A line in the middle of one, though its hash is right, made a file with that tensor one and a half times."""
    made, data = written(tmp_path, 100, 3000)
    assert Journal(made.path, "me").begin(data, {100, 5000})[0] == 100


def test_a_journal_whose_file_is_gone_starts_anew(tmp_path: Path) -> None:
    made, data = written(tmp_path, 100)
    data.unlink()
    assert Journal(made.path, "me").begin(data)[0] == 0
