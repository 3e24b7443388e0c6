"""Small files from anybody: what is no file is not opened, and JSON is read within limits."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from passes.base import PassError
from passes.files.bounded import DEPTH, check_nesting, parse_json, parse_object, read_bytes, read_text


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + '{"a": [1, 2.5e-3, "ä"]}'.encode())
    assert parse_object(read_text(tmp_path / "a.json"), "a") == {"a": [1, 2.5e-3, "ä"]}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "[" * (DEPTH + 2) + "]" * (DEPTH + 2),
        '{"a":' * 500 + "1" + "}" * 500,
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 10_000 + "}",
        "",
        "{",
        b"\xff\xfe\x00",
    ],
)
def test_json_that_is_refused(text: str | bytes) -> None:
    with pytest.raises(PassError, match=r"^the record"):
        parse_json(text, "the record")


@pytest.mark.parametrize("text", ["[]", "1", "null", '"a"'])
def test_only_an_object_is_a_record(text: str) -> None:
    with pytest.raises(PassError, match="not a JSON object"):
        parse_object(text, "it")


def test_depth_that_is_allowed() -> None:
    assert parse_json("[" * DEPTH + "]" * DEPTH, "it")


def test_aliases_cost_nothing_and_a_circle_ends() -> None:
    value: list[object] = ["x"]
    for _ in range(40):  # 2^40 values when they are written out
        value = [value, value]
    check_nesting(value, "it")
    value.append(value)
    with pytest.raises(PassError, match="nested"):
        check_nesting(value, "it")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="no such file"):
        read_bytes(tmp_path / "a")
    with pytest.raises(PassError, match="is a folder"):
        read_bytes(tmp_path)
    (tmp_path / "big").write_bytes(bytes(11))
    with pytest.raises(PassError, match="at most 10"):
        read_bytes(tmp_path / "big", 10)
    (tmp_path / "text").write_bytes(b"\xff{}")
    with pytest.raises(PassError, match="not text in UTF-8"):
        read_text(tmp_path / "text")
    with pytest.raises(PassError, match="cannot read"):
        read_bytes(tmp_path / ("x" * 5000))
    with pytest.raises(PassError, match="cannot read"):
        read_bytes(tmp_path / "a\0b")


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither")
def test_a_pipe_and_a_device_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PassError, match="named pipe"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(PassError, match="is a device"):
        read_bytes(Path("/dev/zero"))
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(PassError, match="is a socket"):
            read_bytes(tmp_path / "socket")


def test_numbers_keep_their_types() -> None:
    text = json.dumps({"a": 1, "b": 1.0, "c": True, "d": None})
    assert [type(v) for v in parse_object(text, "it").values()] == [int, float, bool, type(None)]
