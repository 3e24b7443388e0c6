"""The runner: its syntax, its checks, its records, and that passes stay linear and free of heavy imports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import diffc
import passes
from passes import Pass, PassCheckError, PassError, PassResult, Pipeline, all_passes
from passes.base import RENAMED
from passes.graph.check import all_of, check_structure
from passes.graph.from_onnx import import_graph
from passes.graph.inference import infer_types
from passes.graph.to_onnx import export_graph
from passes.pipeline import Event
from passes.presets import CANONICAL, TARGETS
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import count_calls, model, ops, recipes

RNG = np.random.default_rng(8)


@dataclass(frozen=True)
class Options(Pass):
    """A pass with one option of each type, known only here."""

    name: ClassVar[str] = "try-options"
    count: int = 1
    rate: float = 0.5
    deep: bool = False
    label: str = "a"
    kinds: tuple[str, ...] = ("x",)
    sizes: tuple[int, ...] = ()

    def run(self, graph: gs.Graph) -> PassResult:
        return PassResult(notes=(f"{len(graph.nodes)} seen",))


@dataclass(frozen=True)
class Break(Pass):
    """Damages the graph in the way that `how` names."""

    name: ClassVar[str] = "break"
    how: str = ""

    def run(self, graph: gs.Graph) -> PassResult:
        getattr(self, f"_{self.how}")(graph)
        return PassResult(1)

    def _dangle(self, graph: gs.Graph) -> None:
        graph.nodes[1].inputs[0] = gs.Variable("from nowhere")

    def _rename(self, graph: gs.Graph) -> None:
        graph.nodes[1].name = graph.nodes[0].name

    def _output(self, graph: gs.Graph) -> None:
        graph.outputs[0].name = "other"

    def _retype(self, graph: gs.Graph) -> None:
        graph.outputs[0].dtype = np.dtype(np.float16)

    def _operator(self, graph: gs.Graph) -> None:
        graph.nodes[1].op = "NoSuchOperator"

    def _attribute(self, graph: gs.Graph) -> None:
        graph.nodes[1].attrs["keepdims"] = "yes"

    def _reverse(self, graph: gs.Graph) -> None:
        graph.nodes.reverse()


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes.base._REGISTRY, Options.name, Options)


def small() -> onnx.ModelProto:
    return model(
        "g (float[b,4] x) => (float[b,4] y) { h = MatMul(x, w)  y = Exp(h) }",
        {"w": Recipe.of_array(RNG.standard_normal((4, 4)).astype(np.float32))},
    )


@pytest.mark.parametrize(
    "text",
    [
        "fold-constants",
        "fold-constants,remove-unused",
        "fold-constants{max_elements=7},widen-types{source=float16},remove-unused",
        "decompose-attention{dtypes=float32;float16,max_head_dim=64}",
        "try-options{count=3,rate=0.25,deep=true,label=b c,kinds=p;q,sizes=1;2}",
    ],
)
@pytest.mark.usefixtures("options")
def test_parse_and_str_round_trip(text: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert Pipeline.parse(str(pipeline)).passes == pipeline.passes


@pytest.mark.usefixtures("options")
def test_values_have_the_types_of_the_fields() -> None:
    (step,) = Pipeline.parse(" try-options{ count = 3, rate=1e-3, deep=TRUE, kinds=, sizes=4 } ").passes
    assert step == Options(count=3, rate=1e-3, deep=True, kinds=(), sizes=(4,))
    assert str(Pipeline.parse("try-options{count=1,rate=0.5}")) == "try-options"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold-constant", "unknown pass 'fold-constant'. Known passes: .*fold-constants.*remove-unused"),
        ("try-options{sise=3}", "no option 'sise=3'. Known options: count=int, rate=float, deep=bool"),
        ("try-options{count}", "no option 'count'. Known options: count=int"),
        ("try-options{count=few}", "option 'count' of pass 'try-options' is 'few'; expected int"),
        ("try-options{deep=1}", "option 'deep' .* expected true or false"),
        ("try-options{sizes=1;b}", "option 'sizes' .* is 'b'; expected int"),
        ("fold-constants{max_elements=3", "cannot read the pipeline at 'fold-constants{max_elements=3'"),
        ("fold-constants remove-unused", "cannot read the pipeline"),
        ("", "the pipeline is empty"),
    ],
)
@pytest.mark.usefixtures("options")
def test_parse_errors_name_the_choices(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text)


def test_records_events_and_dumps(tmp_path: Path) -> None:
    before = model(
        """g (float[b,4] x) => (float[b,4] y) {
            a = Constant<value = float {2.0}>()
            c = Constant<value = float {3.0}>()
            d = Mul(a, c)
            dead = Exp(x)
            y = Mul(x, d)
        }"""
    )
    events: list[Event] = []
    folder = tmp_path / "dump"
    pipeline = Pipeline([*Pipeline.parse("fold-constants,remove-unused").passes, Options(count=2)])
    result = pipeline.run(before, on_event=events.append, dump=folder)
    fold, remove, options_record = result.records
    assert (fold.name, fold.changed, fold.nodes_before, fold.nodes_after) == ("fold-constants", 3, 5, 2)
    assert (remove.nodes_before, remove.nodes_after) == (2, 1)
    assert (options_record.name, options_record.changed, options_record.notes) == (
        "try-options{count=2}",
        0,
        ("1 seen",),
    )
    assert (fold.check, options_record.check) == ("structure of 2 nodes", "unchanged")
    assert result.changed == fold.changed + remove.changed
    assert all(record.seconds > 0 for record in result.records)
    assert [(e.step.name, e.record is not None) for e in events] == [
        (name, done) for name in ("fold-constants", "remove-unused", "try-options") for done in (False, True)
    ]
    names = ["00-fold-constants.onnx", "01-remove-unused.onnx", "02-try-options.onnx"]
    assert [path.name for path in sorted(folder.iterdir())] == names
    assert onnx.load(folder / names[-1]) == result.model


def test_the_model_that_came_in_is_not_touched() -> None:
    before = small()
    copy = before.SerializeToString(deterministic=True)
    Pipeline(CANONICAL).run(before)
    assert before.SerializeToString(deterministic=True) == copy


def test_runs_give_identical_bytes() -> None:
    before = small()
    first, second = (
        Pipeline(CANONICAL).run(before).model.SerializeToString(deterministic=True) for _ in "ab"
    )
    assert first == second


def test_metadata_survives() -> None:
    before = small()
    before.producer_name, before.ir_version = "someone", 10
    onnx.helper.set_model_props(before, {"family": "sd3"})
    after = Pipeline(CANONICAL).run(before).model
    assert (after.producer_name, after.ir_version) == ("someone", 10)
    assert {p.key: p.value for p in after.metadata_props} == {"family": "sd3"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dangle", "pass 'break': node '.*' .Exp. reads tensor 'from nowhere'"),
        ("rename", "pass 'break': node name .* used twice"),
        ("output", "pass 'break': graph outputs changed from .*'y'.* to .*'other'"),
        ("retype", "pass 'break': graph outputs changed"),
        ("operator", "pass 'break': .*NoSuchOperator"),
        ("attribute", "pass 'break': .*keepdims"),
        ("reverse", "pass 'break': node '.*' .Exp. reads tensor 'h', not produced before it"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_caught(how: str, message: str) -> None:
    with pytest.raises(PassCheckError, match=message):
        Pipeline([Break(how=how)]).run(small())


def test_wrong_types_are_caught_by_strict_inference() -> None:
    bad = model("g (float[2] x, float16[2] z) => (float[2] y) { h = Exp(x)  y = Add(h, z) }")
    with pytest.raises(PassError, match=r"the model is not valid ONNX: .*Add"):
        Pipeline([]).run(bad)


def test_a_check_of_ones_own_sees_before_after_and_pass() -> None:
    seen: list[tuple[bool, int, str]] = []

    def check(before: onnx.ModelProto | None, after: onnx.ModelProto, step: Pass | None) -> str:
        seen.append((before is None, len(after.graph.node), step.name if step else ""))
        return "seen"

    before = model("g (float[b] x) => (float[b] y) { a = Identity(x)  y = Exp(a) }")
    result = Pipeline.parse("fold-constants,remove-unused").run(before, check=all_of(check_structure, check))
    assert seen == [(True, 2, ""), (False, 1, "fold-constants")]  # remove-unused changed nothing
    assert result.records[0].check == "structure of 1 nodes; seen"

    def refuse(*_: Any) -> str:
        raise PassCheckError("pass 'fold-constants': tensor 'y' differs")

    with pytest.raises(PassCheckError, match="tensor 'y' differs"):
        Pipeline.parse("fold-constants").run(before, check=refuse)


def test_nodes_without_a_name_get_one() -> None:
    result = Pipeline([]).run(model("g (float[b] x) => (float[b] y) { a = Exp(x)  y = Exp(a) }"))
    assert [node.name for node in result.model.graph.node] == ["Exp_a", "Exp_y"]


def test_inferred_types_leave_recipes_and_interface_alone() -> None:
    before = small()
    typed = infer_types(before)
    assert [value.name for value in typed.graph.value_info] == ["h"]
    assert typed.graph.input == before.graph.input
    assert typed.graph.initializer == before.graph.initializer


def test_every_pass_is_documented_frozen_and_named_like_its_file() -> None:
    assert {*all_passes()} >= {
        "decompose-attention",
        "fold-constants",
        "fold-weight-layout",
        "fold-weight-qdq",
        "remove-unused",
        "split-sequences",
        "widen-types",
    }
    for name, cls in all_passes().items():
        assert cls.__module__.rpartition(".")[2] == name.replace("-", "_")
        assert (cls.__doc__ or "").count("\n") > 3
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert Pipeline.parse(name).passes == (cls(),)
        assert all(field.default is not None for field in fields(cls))


def test_old_names_of_passes_still_work_until_version_0_3() -> None:
    for old, new in RENAMED.items():
        with pytest.warns(DeprecationWarning, match=new):
            assert Pipeline.parse(old).passes == (all_passes()[new](),)
    assert diffc.__version__ < "0.3", "remove passes.base.RENAMED and this test"


def test_presets_parse() -> None:
    for steps in (CANONICAL, *TARGETS.values()):
        if steps:
            assert Pipeline.parse(str(Pipeline(steps))).passes == steps


def test_imports_nothing_heavy() -> None:
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnxruntime", "diffc", "diffusers", "modelopt", "tensorrt"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import passes, passes.presets, passes.storage
assert passes.all_passes()
print(len(passes.all_passes()))
"""
    root = Path(passes.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(all_passes())


BLOCK = """
    c@ = Constant<value_ints = [0, 0, 2, 4]>()
    r@ = Reshape(h#, c@)
    t@ = Transpose<perm = [0, 2, 1, 3]>(r@)
    a@ = Attention(t@, t@, t@)
    b@ = Transpose<perm = [0, 2, 1, 3]>(a@)
    f@ = Constant<value_ints = [0, 0, 8]>()
    e@ = Reshape(b@, f@)
    q@ = QuantizeLinear(w@, scale, zero)
    d@ = DequantizeLinear(q@, scale, zero)
    x@ = Transpose<perm = [1, 0]>(d@)
    m@ = MatMul(e@, x@)
    four@ = Constant<value_int = 4>()
    s@ = SplitToSequence<axis = 2>(m@, four@)
    zero@ = Constant<value_int = 0>()
    one@ = Constant<value_int = 1>()
    g@ = SequenceAt(s@, zero@)
    k@ = SequenceAt(s@, one@)
    j@ = Concat<axis = 2>(k@, g@)
    h@ = Identity(j@)
"""


def blocks(count: int) -> onnx.ModelProto:
    """A chain of `count` blocks of 19 nodes: attention, a quantized weight, a split, shared scales."""
    text = "".join(BLOCK.replace("@", str(i + 1)).replace("#", str(i)) for i in range(count))
    weights: dict[str, Any] = {
        f"w{i + 1}": Recipe.of_array(RNG.standard_normal((8, 8)).astype(np.float32)) for i in range(count)
    }
    head = "g (float[b,s,8] h0) => (float[b,s,8] y) {"
    return model(
        f"{head} {text} y = Exp(h{count}) }}", weights | {"scale": np.float32(0.02), "zero": np.int8(0)}
    )


def test_the_presets_clean_the_blocks() -> None:
    result = Pipeline([*CANONICAL, *TARGETS["trt-rtx"]]).run(blocks(3))
    assert set(ops(result.model)) == {
        "Reshape", "Transpose", "MatMul", "Mul", "Softmax", "DequantizeLinear", "Split", "Concat", "Exp",
    }  # fmt: skip
    assert {r.nbytes for r in recipes(result.model).values()} == {64}


# In a graph of float32 at opset 23 whose quantizers are all on weights, without TensorRT's operators, norms and Gelu.
NOTHING_TO_DO = (
    "cast-unsupported",
    "fold-int4-weights",
    "fold-scale-cast",
    "fuse-lora",
    "fuse-qdq",
    "keep-stored-codes",
    "match-types",
    "normalize-qdq",
    "quantize-softmax",
    "share-scales",
    "widen-types",
    "drop-rounding",
    "rewrite-opset",
    "type-trt-ops",
    "emulate-fp4",
    "add-trt-functions",
    "split-cache",  # without groups
    "add-zero-bias",
    "cast-io",  # without names
    "fuse-adaptive-norm",
    "fix-size",  # without a size
    "fold-gates",
    "fold-value-bias",
    "fuse-bias-gelu",
    "fuse-residual",
    "fuse-rms-norm",
    "fuse-rotary",
    "fuse-shared-norm",
    "fuse-skip-norm",
    "join-slices",
    "keep-float32",
    "guard-slices",
    "lift-bias",
    "merge-modulations",
    "merge-projections",
    "merge-row-products",
    "rewrite-patches",
    "inline-functions",
    "name-dimensions",
)


def _named(graph: gs.Graph) -> gs.Graph:
    for position, node in enumerate(graph.nodes):
        node.name = node.name or f"n{position}"
    return graph


@pytest.fixture(scope="module")
def stages() -> dict[str, tuple[onnx.ModelProto, ...]]:
    """Two networks of 2,015 and 10,071 nodes, built once, in the state in which the presets run each canonical pass.

    "" is the state after all of them, in which every other pass runs.
    """
    graphs = [_named(import_graph(infer_types(blocks(count)))) for count in (106, 530)]
    likes = [blocks(1)] * 2
    found = {}
    for step in CANONICAL:
        found[step.name] = tuple(export_graph(g, like) for g, like in zip(graphs, likes, strict=True))
        for graph in graphs:
            step.run(graph)
    return found | {"": tuple(export_graph(g, like) for g, like in zip(graphs, likes, strict=True))}


@pytest.mark.parametrize("name", ["import", *sorted(all_passes())])
def test_ten_thousand_nodes_cost_five_times_two_thousand(
    name: str, stages: dict[str, tuple[onnx.ModelProto, ...]]
) -> None:
    costs = []
    for big in stages["fold-constants" if name == "import" else name if name in stages else ""]:
        if name == "import":
            costs.append(count_calls(lambda m=big: export_graph(import_graph(m), m)))  # type: ignore[misc]
            continue
        graph, step, results = import_graph(big), all_passes()[name](), list[PassResult]()
        costs.append(count_calls(lambda g=graph, s=step, r=results: r.append(s.run(g))))  # type: ignore[misc]
        assert results[0].changed or name in NOTHING_TO_DO
    assert costs[1] < 5.5 * costs[0], costs
