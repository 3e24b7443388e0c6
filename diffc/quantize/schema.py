"""The fields of checkpoint.json, with their types."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from diffc.records import Text

_Bits = int | tuple[int, int]


class Quantizer(Struct, forbid_unknown_fields=True):
    """The settings of one quantizer, as `state.settings_of` writes them."""

    num_bits: _Bits
    axis: int | list[int] | None
    block_sizes: dict[str, Any] | None
    type: Literal["static", "dynamic"]
    unsigned: bool
    narrow_range: bool


class Record(Struct):
    """checkpoint.json."""

    schema: int
    family: Text
    format: Text
    config: dict[str, Any]
    settings: dict[str, Quantizer]
    source: str
    calibration: dict[str, Any]
    versions: dict[str, str]
    tensors_sha256: str
    weights_sha256: str | UnsetType = UNSET
