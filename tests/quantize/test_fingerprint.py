"""What a checkpoint remembers of its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from diffc.quantize.fingerprint import backbone_config, config_hash


class Backbone:
    config: ClassVar[dict[str, Any]] = {
        "layers": 2,
        "sizes": (1, 2),
        "_name_or_path": "/home/me",
        "_diffusers_version": "0.1",
    }


def test_the_config_is_plain_and_without_notes_of_diffusers() -> None:
    found = backbone_config(Backbone())  # type: ignore[arg-type]
    assert found == {"_class_name": "Backbone", "layers": 2, "sizes": [1, 2]}
    other = SimpleNamespace(config={**Backbone.config, "layers": 3})
    assert config_hash(backbone_config(other)) != config_hash(found)  # type: ignore[arg-type]


def test_the_hash_is_of_the_entries_in_any_order() -> None:
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert len({config_hash(c) for c in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"})}) == 4
