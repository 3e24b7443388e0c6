"""The stored table of what compilers and runtimes take: diffc's refusals agree with it, and its probes with it."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from diffc.backends import sm as base
from diffc.backends.sm import KNOWN_SMS, check_sms, required_sm
from diffc.backends.target import TARGETS
from diffc.backends.tensorrt.errors import fix_for
from diffc.errors import UnsupportedError
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions
from passes.targets.tensorrt.decompose_attention import DecomposeAttention
from tools.compat import backends as compat_backends
from tools.compat import main as compat
from tools.compat import run as compat_run
from tools.compat import table as compat_table
from tools.compat.catalogue import all_probes
from tools.compat.net import F16, Net

STORED = compat_table.load(compat.STORED)
PROBES = all_probes()
HPS = ("float16", "bfloat16", "float32")
# format: the layer that it is made of, in the compute type {}
LAYERS = {
    "none": "MatMul, {}",
    "int8": "weight and input, INT8, {}, per channel",
    "int8_smoothquant": "weight and input, INT8, {}, per channel",
    "fp8": "weight and input, FP8, {}, per tensor",
    "int4_awq": "weight, {}, [N,K] and Transpose, K 256, block 128",
    "w4a8_awq": "W4A8, {}, [N,K] and Transpose, K 256, block 128",
    "nvfp4": "W4A4, {}, [N,K] and Transpose, FLOAT, then Cast",
    "nvfp4_svdquant": "W4A4, {}, low-rank branch",
    "mxfp8": "W8A8, {}, out {}, [N,K] and Transpose",
}
# Said of networks that no pass of diffc leaves behind: operators of ONNX Runtime, an unfinished ModelOpt node.
UNFIXED = {"parser: INVALID_NODE", "parser: Assertion failed: scale != 0: scale is invalid"}
UNFIXED |= {
    "parser: Assertion failed: a->getType() == nvinfer1::DataType::kHALF: input tensor A must be FP16"
}


def taken(name: str, target: str = "trt-rtx") -> list[str]:
    return STORED["probes"][name][target]["verdicts"].get("ok", "").split()


def taken_sms(name: str) -> list[int]:
    return [int(column.removeprefix("sm")) for column in taken(name)]


def disagreements(table: compat_table.Table) -> list[str]:
    """Where diffc's table of element types says something else than the measured one."""
    found = []
    for number, oldest in table["min_sm"].items():
        told = base._TYPE_MIN_SM.get(int(number), ("", KNOWN_SMS[0]))[1]
        found += [] if told == oldest else [f"type {number}: {told}, measured {oldest}"]
    unmeasured = [t for t in base._TYPE_MIN_SM if str(t) not in table["min_sm"]]
    return found + [f"type {number}: never probed" for number in unmeasured]


def test_the_table_of_types_is_the_measured_one():
    assert disagreements(STORED) == []
    assert compat_table.min_sm(STORED["probes"]) == STORED["min_sm"]


@pytest.mark.parametrize(("number", "sm"), [("17", 86), ("22", 75), ("21", 120), ("10", 80)])
def test_a_release_that_takes_a_type_elsewhere_shows(number, sm):
    changed = copy.deepcopy(STORED)
    changed["min_sm"][number] = sm
    assert len(disagreements(changed)) == 1
    del changed["min_sm"]["23"]
    assert len(disagreements(changed)) == 2


def test_types_that_no_builder_reads_are_refused_up_front():
    with pytest.raises(UnsupportedError, match=r"holds FLOAT8E5M2, UINT4, which the compiler cannot read"):
        check_sms({F16, 19, 21}, (89,))
    check_sms({F16, 19, 21}, ())  # ONNX Runtime and TensorRT for this machine's GPU judge for themselves
    assert required_sm({F16, 19}) == (75, "")


@pytest.mark.parametrize("name", FORMATS)
def test_formats_begin_where_their_layer_builds(name):
    layers = {hp: LAYERS[name].format(hp, hp) for hp in HPS}
    oldest = {hp: min(taken_sms(layer)) for hp, layer in layers.items()}
    assert oldest["float16"] == FORMATS[name].min_sm
    # diffc/compile/plan.py: SM75 multiplies in float16 only
    assert oldest["bfloat16"] == oldest["float32"] == max(80, FORMATS[name].min_sm)
    for layer in layers.values():
        assert taken_sms(layer) == [sm for sm in KNOWN_SMS if sm >= min(taken_sms(layer))]


@pytest.mark.parametrize("name", FORMATS)
def test_onnx_runtime_needs_help_with_the_formats_that_say_so(name):
    layer = LAYERS[name].format("float32", "float32")
    assert ("cpu-exact" in taken(layer, "ort")) == (name not in TARGETS["ort"].emulates)


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq"])
@pytest.mark.parametrize("hp", HPS)
def test_block_sizes_that_can_be_asked_for_build(name, hp):
    for block in (32, 64, 128):
        QuantOptions(block_size=block).check(FORMATS[name])
        layer = LAYERS[name].format(hp).replace("block 128", f"block {block}")
        assert max(taken_sms(layer)) == KNOWN_SMS[-1]


def test_attention_is_taken_apart_where_there_is_no_kernel():
    sizes = [int(n.rsplit(" ", 1)[1]) for n in PROBES if n.startswith("Attention, float16, head size")]
    built = [size for size in sizes if taken(f"Attention, float16, head size {size}")]
    limit = DecomposeAttention().max_head_dim
    assert built == [size for size in sizes if size <= limit]
    assert limit in sizes
    assert max(sizes) > limit
    assert not taken("Attention, opset 23, float32")
    assert "float32" in DecomposeAttention().dtypes
    for option in ("softcap", "softmax_precision", "four outputs"):
        assert not taken(f"Attention, float16, {option}")
    assert taken("Q/DQ on q, k, v, MatMul, Softmax, Q/DQ, MatMul, float16, head size 64")


def test_every_reason_has_a_fix():
    said = {v for p in STORED["probes"].values() for v in p["trt-rtx"]["verdicts"]}
    without = {v for v in said if v.startswith(("parser", "builder")) and not fix_for(v)}
    assert without == UNFIXED


def test_weights_stay_as_small_as_they_are_stored():
    bits = {}
    for name in PROBES:
        if name.startswith("layer of ") and name.endswith("float16"):
            figure = STORED["probes"][name]["trt-rtx"]["figures"]["bits"]
            bits[name.split(", ")[1]] = float(figure)
    assert bits["INT4"] < bits["W4A8"] < bits["INT8"] < bits["FP8"] < bits["MXFP8"] < bits["plain"]
    assert bits["NVFP4"] < 8 < bits["plain"] < bits["NVFP4 in the graph"]  # why fold-weight-qdq folds it


def test_the_document_is_of_the_same_run():
    assert compat.DOCUMENT.read_text("utf-8") == compat.document(list(PROBES.values()), STORED)
    assert list(STORED["probes"]) == list(PROBES)


def test_the_table_is_of_the_pinned_versions():
    for runtime in compat_run.installed():
        told = STORED["versions"].get(runtime.target.name)
        assert told == runtime.version, "run python -m tools.compat --check, then --write"


def named(*names: str) -> list:
    return [PROBES[name] for name in names]


@pytest.fixture(scope="module")
def measured() -> tuple[list, list, compat_table.Table]:
    """A few probes measured now, among them one that ends the builder's process."""
    runtimes = [r for r in compat_run.installed() if r.target.name in ("trt-rtx", "ort")]
    probes = named(
        "MatMul, float32",
        "Attention, float16, q, k, v one tensor",
        LAYERS["nvfp4"].format("bfloat16"),
        "weight and input, FP8, float32, per tensor",
        "W8A8, float16, K 48",
        "LayerNormalization, float16, float32 scale and bias",
    )
    found = compat.measure(probes, runtimes)
    return probes, runtimes, compat_table.merge({}, probes, compat.versions(runtimes), found)


def test_probes_say_today_what_is_stored(measured, capsys):
    probes, runtimes, table = measured
    assert compat.check(STORED, table, probes, runtimes) == 0
    assert capsys.readouterr().out.endswith("0 differences in 6 probes\n")


def test_a_crash_is_a_verdict_and_the_rest_goes_on(measured):
    pytest.importorskip("tensorrt_rtx")
    _, _, table = measured
    verdicts = {name: p["trt-rtx"]["verdicts"] for name, p in table["probes"].items()}
    columns = " ".join(f"sm{sm}" for sm in KNOWN_SMS)
    assert verdicts["Attention, float16, q, k, v one tensor"] == {"crash: SIGSEGV": columns}
    assert verdicts["W8A8, float16, K 48"].keys() == {
        "parser: The given block size does not divide the input extent in axis 1Input extent = 48, block size = 32"
    }


def test_check_names_what_changed(measured, capsys):
    probes, runtimes, table = measured
    damaged = copy.deepcopy(table)
    target = runtimes[-1].target.name
    entry = damaged["probes"]["MatMul, float32"][target]
    entry["verdicts"] = {"load: no such kernel": " ".join(runtimes[-1].columns)}
    entry["figures"] = {"distance": "1e-01"}
    del damaged["probes"]["W8A8, float16, K 48"]
    damaged["versions"][target] = "0.1"
    assert compat.check(damaged, table, probes, runtimes) == 1
    out = capsys.readouterr().out
    assert f"version of {target}: 0.1 -> {runtimes[-1].version}" in out
    assert f"MatMul, float32: {target} {runtimes[-1].columns[0]}: load: no such kernel -> ok" in out
    assert f"MatMul, float32: {target} distance: 1e-01 -> " in out
    assert f"W8A8, float16, K 48: {target}: not stored" in out


def test_the_rest_of_a_runtime_that_is_not_here_is_kept(measured):
    probes, _, table = measured
    stored = {
        "versions": {"tensorrt": "11.4"},
        "probes": {p.name: {"tensorrt": {"verdicts": {"ok": "gpu"}}} for p in probes},
    }
    merged = compat_table.merge(stored, probes, table["versions"], {p.name: {} for p in probes})
    assert merged["versions"]["tensorrt"] == "11.4"
    assert merged["probes"]["MatMul, float32"]["tensorrt"] == {"verdicts": {"ok": "gpu"}}


def test_a_document_round_trips(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(compat_table.dump(STORED), encoding="utf-8")
    assert compat_table.load(path) == STORED
    assert path.read_bytes() == compat.STORED.read_bytes()


def test_reasons_say_the_same_for_every_node():
    where = "ITensor::getDimensions: Error Code 4: API Usage Error"
    said = f"Invalid Node - Add_1\n{where} (Add_1: must differ. In validate at /_src/a.cpp:4)"
    assert compat_backends.reason(said) == compat_backends.reason(said.replace("Add_1", "Add_77"))
    assert compat_backends.reason(said) == "must differ"
    assert compat_backends.reason("false", "UNSUPPORTED_NODE") == "UNSUPPORTED_NODE"


def test_distances_see_what_differs():
    x = np.random.default_rng(4).standard_normal((8, 16)).astype(np.float32)
    assert compat_backends.distance(x, x) == 0
    assert compat_backends.distance(x, x * 1.01) == pytest.approx(0.01, rel=1e-3)
    assert compat_backends.distance(x, x[:4]) == np.inf
    broken = x.copy()
    broken[0, 0] = np.nan
    assert compat_backends.distance(x, broken) == np.inf


def test_probes_are_of_random_values_and_made_alike_each_time():
    for probe in PROBES.values():
        model = probe.net().model()
        assert model.SerializeToString() == probe.net().model().SerializeToString()
    net = Net()
    weight = net.rng.bit_generator.state
    net.weight(F16, 4, 4)
    assert net.rng.bit_generator.state != weight
