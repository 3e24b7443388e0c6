"""Compute capabilities: how they are written, and what is refused before anything is built."""

from __future__ import annotations

import pytest
from onnx import TensorProto

from diffc.backends.sm import (
    KNOWN_SMS,
    check_format_sms,
    check_sms,
    parse_sm,
    required_sm,
    with_cards,
)
from diffc.errors import UnsupportedError, UsageError

FP4, FP8, BF16, F32 = (
    int(t)
    for t in (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16, TensorProto.FLOAT)
)


@pytest.mark.parametrize("sm", KNOWN_SMS)
def test_every_spelling(sm: int) -> None:
    dotted = f"{str(sm)[:-1]}.{str(sm)[-1]}"
    assert {parse_sm(text) for text in (f"{sm}", f"sm{sm}", f"SM{sm}", f"sm_{sm}", dotted, f" {sm} ")} == {sm}
    assert with_cards(sm).startswith(f"SM{sm} (")
    assert with_cards(999) == "SM999"


@pytest.mark.parametrize("text", ["", "8", "88", "sm", "-89", "89x", "٨٩", "8.9.0.1"])
def test_other_texts_list_the_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown compute capability .*Known: 75, 80, 86, 89, 120, 121"):
        parse_sm(text)


@pytest.mark.parametrize(
    ("types", "sm", "name"),
    [
        ([F32], 75, ""),
        ([F32, BF16], 80, "BFLOAT16"),
        ([BF16, FP8], 89, "FP8"),
        ([FP8, FP4], 120, "FP4"),
        ([], 75, ""),
    ],
)
def test_the_type_that_decides(types: list[int], sm: int, name: str) -> None:
    found = required_sm(types)
    assert found[0] == sm
    assert found[1].startswith(name)
    assert bool(found[1]) == bool(name)
    check_sms(types, [known for known in KNOWN_SMS if known >= sm])
    for old in (known for known in KNOWN_SMS if known < sm):
        with pytest.raises(UnsupportedError) as raised:
            check_sms(types, [121, old])
        assert f"needs SM{sm} or newer; too old: SM{old}." in str(raised.value)
        assert raised.value.fix.startswith(f"leave out --sm {old}")


def test_types_that_no_builder_reads() -> None:
    with pytest.raises(
        UnsupportedError, match="the model holds FLOAT8E5M2, UINT16, which the compiler cannot read"
    ):
        check_sms([F32, TensorProto.UINT16, TensorProto.FLOAT8E5M2], [120])
    check_sms([TensorProto.UINT16], [])  # nothing is built


def test_formats_and_what_runs_on_the_older_one() -> None:
    check_format_sms("fp8", 89, (89, 120))
    with pytest.raises(UnsupportedError, match="format 'nvfp4' was asked for, which needs SM120") as raised:
        check_format_sms("nvfp4", 120, (120, 86))
    assert "too old: SM86. Formats that run there: none, int8" in str(raised.value)
    assert "fp8" not in str(raised.value).partition("run there: ")[2]


@pytest.mark.parametrize(
    ("text", "says"), [("90", "ort-cuda for H100"), ("9.0", "ort-cuda for H100"), ("foo", "RTX 40")]
)
def test_what_to_give_instead_is_told_by_the_names_of_cards(text: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_sm(text)
    assert says in raised.value.fix
