"""Files of cache plans from anybody: plain values, or one error at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from diffc.cache.plan import CachePlan
from diffc.cache.resolve import matches
from diffc.errors import DiffcError

ALIASES = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
ENTRY = '{"entries": [{"blocks": ["a.*"], "steps": %s}]}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", ALIASES),
        ("b.yaml", "{<<: " * 200 + "{}" + "}" * 200),
        ("c.yaml", "entries: " + "[" * 5000),
        ("d.yaml", "entries: !!python/object/apply:os.system [ls]"),
        ("e.yaml", "? {a: 1}\n: 2"),
        ("f.json", "[" * 200_000),
        ("g.json", '{"entries": null}'),
        ("h.json", '{"entries": 7}'),
        ("i.json", '{"entries": [], "name": [1]}'),
        ("j.json", ENTRY % '{"every": NaN}'),
        ("k.json", ENTRY % '{"start": 1e999}'),
        ("l.yaml", ENTRY % '{"stop": .inf}'),
        ("m.yaml", ENTRY % '{"start": .nan}'),
        ("n.json", ENTRY % '{"every": "2"}'),
        ("o.json", ENTRY % "[true]"),
        ("p.json", ENTRY % '{"by_count": {"x": [1]}}'),
        ("q.yaml", "\x00"),
        ("r.yaml", "entries: 2001-99-99"),
    ],
)
def test_a_file_that_is_no_plan(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(DiffcError) as told:
        CachePlan.load(tmp_path / name)
    assert time.process_time() - started < 1
    assert told.value.fix
    assert len(str(told.value)) < 2000


def test_a_pattern_of_many_stars_ends() -> None:
    path = "transformer_blocks.0.attn.to_q.lora.down"
    assert matches(".".join(["**"] * 300), path)
    assert not matches(".".join(["**", "x"] * 300), path)
    assert matches("**.attn.**.down", path)
    assert not matches("**.**.attn", path)
