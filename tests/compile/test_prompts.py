"""Prompt sets in the forms that people have them in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffc.compile.prompts import read_prompts
from diffc.errors import DiffcError

FOX, OWL = 'a red fox, "asleep" in snow', "Eule über dem Wald"


def test_every_form_gives_the_same_prompts(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = [{"id": 7, "Caption": FOX}, {"id": 8, "Caption": f"  {OWL}\n"}, {"id": 9, "Caption": None}]
    quoted = FOX.replace('"', '""')
    texts = {
        "a.txt": f"\ufeff{FOX}\r\n\r\n{OWL}\r\n",
        "a.csv": f'id,Caption\n1,"{quoted}"\n2,"{OWL}"\n3,\n',
        "b.tsv": f'Caption\tid\n"{quoted}"\t1\n{OWL}\t2\n',
        "a.json": json.dumps([FOX, OWL]),
        "b.json": json.dumps(rows),
        "c.json": json.dumps({"version": 3, "prompts": [FOX, OWL]}),
        "d.json": json.dumps({"images": [], "captions": [{"image_id": 1, "caption": FOX}, OWL]}),
        "e.json": json.dumps([{"captions": [FOX, "second"]}, {"captions": [OWL]}, {"captions": []}]),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in (*texts, "a.parquet"):
        assert read_prompts(tmp_path / name) == (FOX, OWL), name
        assert read_prompts(tmp_path / name, 1) == (FOX,), name


def test_a_data_set_folder_is_read_shard_by_shard(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in (2, 0, 1):
        shard = tmp_path / "data" / f"train-{number}.jsonl"
        shard.write_text(json.dumps({"text": f"prompt {number}", "url": "x"}), encoding="utf-8")
    (tmp_path / "dataset_infos.json").write_text("{}", encoding="utf-8")
    (tmp_path / "README.txt").write_text("about it", encoding="utf-8")
    assert read_prompts(tmp_path) == ("prompt 0", "prompt 1", "prompt 2")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,url\n1,x\n", "none of its columns is called prompt.*: id, url"),
        ("a.json", '{"a": 1}', "none of its columns"),
        ("a.json", "[1, 2]", "1 is no prompt"),
        ("a.json", "[", "cannot read the prompts file"),
        ("a.txt", " \n", "holds no prompt"),
        ("a.parquet", "PAR", "cannot read the prompts file"),
    ],
)
def test_what_is_no_prompt_set_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DiffcError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert caught.value.fix
    with pytest.raises(DiffcError, match="without prompts"):
        read_prompts(_empty(tmp_path))


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"
