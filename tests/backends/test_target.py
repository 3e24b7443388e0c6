"""Targets, compute capabilities and element types as data, held against the builder's own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from diffc.backends.onnx_graph import element_types
from diffc.backends.session import runtime_of
from diffc.backends.sm import KNOWN_SMS, check_format_sms, check_sms, parse_sm, required_sm
from diffc.backends.target import RUNTIMES, TARGETS, find_target
from diffc.backends.tensorrt.errors import builder_error, crash_error
from diffc.errors import DiffcError, UnsupportedError
from passes import presets
from tests.networks import FP8, FP16, FP32, INT8, build, make, network, value


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


def test_compute_capabilities_are_parsed():
    assert [parse_sm(t) for t in ("89", "sm89", "SM120", "8.9", "12.1", "sm_75")] == [
        89,
        89,
        120,
        89,
        121,
        75,
    ]
    for text in ("90", "sm", "", "8.99", "-89", "²", "compute"):
        with pytest.raises(DiffcError, match="Known: 75, 80, 86, 89, 120, 121"):
            parse_sm(text)


@pytest.mark.usefixtures("rtx")
def test_the_builder_knows_these_compute_capabilities():
    import tensorrt_rtx

    names = [n for n in tensorrt_rtx.ComputeCapability.__members__ if n.startswith("SM")]
    assert sorted(int(n.removeprefix("SM")) for n in names) == list(KNOWN_SMS)


def test_types_decide_the_oldest_compute_capability():
    assert required_sm(set()) == (75, "")
    assert required_sm({FP16, FP32, INT8, TensorProto.UINT8}) == (75, "")
    assert required_sm({FP16, TensorProto.INT4}) == (80, "INT4")
    assert required_sm({FP16, TensorProto.BFLOAT16}) == (80, "BFLOAT16")
    assert required_sm({TensorProto.BFLOAT16, FP8}) == (89, "FP8 (FLOAT8E4M3FN)")
    assert required_sm({TensorProto.FLOAT8E8M0}) == (89, "MXFP8 scales (FLOAT8E8M0)")
    assert required_sm({FP8, TensorProto.FLOAT4E2M1}) == (120, "FP4 (FLOAT4E2M1)")
    check_sms({FP8}, (89, 120))
    with pytest.raises(
        UnsupportedError, match=r"FP4.*SM120 or newer; too old: SM86, SM89.*none, int8, .*int4_awq\n"
    ):
        check_sms({TensorProto.FLOAT4E2M1}, (120, 89, 86))


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("sm", [75, 80])
def test_the_builder_agrees_about_bfloat16(tmp_path, sm):
    """The table's rows are the builder's: without our check, it refuses the same."""
    model = network(TensorProto.BFLOAT16, dtype=TensorProto.BFLOAT16)
    if sm == 80:
        assert build(tmp_path, model, (80,)).nbytes > 2 * 256 * 256 * 2
        return
    with pytest.raises(UnsupportedError, match="BFLOAT16"):
        build(tmp_path, model, (75,))


def test_a_format_is_checked_before_the_calibration():
    check_format_sms("fp8", 89, (89, 120))
    with pytest.raises(UnsupportedError, match=r"format 'fp8' was asked for.*SM75, SM86.*none, int8"):
        check_format_sms("fp8", 89, (86, 75))


def test_element_types_are_found_wherever_they_hide():
    assert element_types(network(INT8)) == {FP16, INT8}
    assert FP8 in element_types(network(FP8))
    ends = [value("x", FP16, ["b", 64])], [value("y", FP16, ["b", 64])]
    typed = helper.make_node("TRT_FP4DynamicQuantize", ["x"], ["y", "s"], domain="trt")
    assert element_types(make([typed], *ends)) == {FP16, TensorProto.FLOAT4E2M1}
    branch = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["c"], to=FP8), helper.make_node("Cast", ["c"], ["z"], to=FP16)],
        "branch", [], [value("z", FP16, None)],
    )  # fmt: skip
    choice = helper.make_node("If", ["f"], ["y"], then_branch=branch, else_branch=branch)
    flag = value("f", TensorProto.BOOL, [])
    assert element_types(make([choice], [*ends[0], flag], ends[1])) == {FP16, FP8, TensorProto.BOOL}


def test_a_missing_module_is_named_and_doctor_knows_how_to_get_it():
    from dataclasses import replace

    absent = replace(find_target("trt-rtx"), module="no_such_module")
    with pytest.raises(DiffcError, match=r"no_such_module[\s\S]*diffc doctor"):
        absent.require()


@pytest.mark.parametrize(
    ("returncode", "message"),
    [
        (-int(signal.SIGABRT), "SIGABRT"),
        (0xC0000005, "access violation"),
        (1, "exit code 1"),
        (0, "exit code 0"),
    ],
)
def test_other_ends_of_the_builder(tmp_path, returncode, message):
    log = tmp_path / "m.log"
    log.write_text("first\n" + "later\n" * 20 + "OSError: [Errno 28] No space left on device\n")
    text = str(crash_error(Path("m.onnx"), returncode, log))
    assert message in text
    assert "No space left" in text
    assert "first" not in text
    if returncode == 1:
        assert "Fix: free some disk space" in text


def test_a_disk_without_room_for_an_engine_is_said(tmp_path):
    with (tmp_path / "m.onnx_data").open("wb") as file:
        file.truncate(1 << 40)  # a hole, larger than what is free
    for error in (
        builder_error(tmp_path / "m.onnx", [], tmp_path / "m.log"),
        crash_error(tmp_path / "m.onnx", 1, tmp_path / "m.log"),
    ):
        assert "No space left for an engine of about 1099512 MB" in error.what
        assert error.fix == "free some disk space"
    (tmp_path / "m.onnx_data").unlink()
    assert "read the log" in builder_error(tmp_path / "m.onnx", [], tmp_path / "m.log").fix


def test_every_target_has_passes_and_what_opens_it() -> None:
    """A row names both; of several that work, the fastest runs an artifact."""
    assert all(target.passes is not None or name in presets.TARGETS for name, target in TARGETS.items())
    assert list(RUNTIMES)[:6] == ["trt-rtx", "tensorrt", "ort-trt-rtx", "ort-tensorrt", "ort-cuda", "ort"]
    for target in RUNTIMES.values():
        assert target.file_of in TARGETS
        runtime = runtime_of(target)
        assert callable(runtime.open_session)
        reason, fix = runtime.why_not(target)
        assert bool(fix) == bool(reason)
