"""fuse-qdq: the same numbers bit for bit, fewer quantizers, and dequantizers right at what computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes import Pipeline
from passes.canonical.fuse_qdq import FuseQdq
from passes.graph.from_onnx import import_graph
from passes.graph.grids import survives_round_trip
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, count_calls, model, ops
from tests.passes.qdq_networks import (
    FLOAT,
    FP8,
    INT8,
    TYPES,
    Net,
    behind,
    counts,
    fuse,
    random_net,
    reasons,
)


class TestMerge:
    @TYPES
    def test_three_projections_of_one_tensor_share_one_pair(self, kind):
        net = Net(kind)
        for index in range(3):
            net.matmul(net.pair("x", f"s{index}"), 8, f"y{index}")
        after = fuse(net)
        assert counts(after) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "MatMul": 3}

    def test_other_scales_types_and_axes_stay_apart(self):
        net = Net()
        net.matmul(net.pair("x", "a", 0.03), 8, "y0")
        net.matmul(net.pair("x", "b", 0.031), 8, "y1")
        net.matmul(net.pair("x", "c", np.full(8, 0.03), axis=2), 8, "y2")
        net.kind = FP8
        net.matmul(net.pair("x", "d", 0.03), 8, "y3")
        assert counts(fuse(net))["QuantizeLinear"] == 4

    def test_scales_that_are_recipes_are_compared_by_recipe(self):
        text = """g (float[n, 8] x) => (float[n, 8] y) {
            a = QuantizeLinear(x, s0, z)
            b = DequantizeLinear(a, s0, z)
            c = QuantizeLinear(x, s1, z)
            d = DequantizeLinear(c, s1, z)
            e = QuantizeLinear(b, s1, z)
            f = DequantizeLinear(e, s1, z)
            g = Add(b, d)
            y = Add(f, g)
        }"""
        recipe = Recipe.of_array(np.array(3.5, np.float32)).scale_of_amax(127)
        made = model(text, {"s0": recipe, "s1": recipe, "z": np.int8(0)})
        after = apply(made, FuseQdq()).model
        check_same(made, after, {"x": np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)})
        assert counts(after) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Add": 2}

    def test_dynamic_quantizers_of_four_bits_are_merged(self):
        made = model(
            """g (float16[n, 32] x) => (float16[n, 8] y0, float16[n, 8] y1) {
                c0, d0 = trt.TRT_FP4DynamicQuantize<axis=-1, block_size=16, scale_type=17>(x, s)
                e0 = DequantizeLinear(d0, s)
                f0 = DequantizeLinear<axis=-1, block_size=16>(c0, e0)
                h0 = Cast<to=10>(f0)
                y0 = MatMul(h0, w)
                c1, d1 = trt.TRT_FP4DynamicQuantize<axis=-1, block_size=16, scale_type=17>(x, s)
                e1 = DequantizeLinear(d1, s)
                f1 = DequantizeLinear<axis=-1, block_size=16>(c1, e1)
                h1 = Cast<to=10>(f1)
                y1 = MatMul(h1, w)
            }""",
            {"s": np.float32(0.01), "w": np.ones((32, 8), np.float16)},
        )
        made.opset_import.append(helper.make_opsetid("trt", 1))
        for index in range(2):
            for name, kind, width in (("c", TensorProto.FLOAT4E2M1, 32), ("d", FP8, 2)):
                made.graph.value_info.append(
                    helper.make_tensor_value_info(f"{name}{index}", kind, ["n", width])
                )
        for node in made.graph.node:
            if node.op_type.startswith("trt."):
                node.op_type, node.domain = node.op_type[4:], "trt"
        after = apply(made, FuseQdq()).model
        assert counts(after) == {"TRT_FP4DynamicQuantize": 1, "DequantizeLinear": 2, "Cast": 1, "MatMul": 2}


class TestCancel:
    @TYPES
    def test_a_second_quantizer_with_the_same_scale_goes(self, kind):
        net = Net(kind)
        net.matmul(net.pair(net.pair("x")), 8, "y")
        assert ops(fuse(net)) == ["QuantizeLinear", "DequantizeLinear", "MatMul"]

    @TYPES
    def test_through_moves_of_data_that_others_read(self, kind):
        net = Net(kind)
        moved = net.reshape(net.add("Transpose", [net.pair("x")], perm=[0, 2, 1]), [-1, 24])
        net.add("Relu", [moved], "r")
        net.outputs["r"] = FLOAT
        net.matmul(net.pair(moved), 24, "y")
        after = fuse(net)
        assert counts(after)["QuantizeLinear"] == 1
        assert behind(after, "y")[:3] == ["MatMul", "DequantizeLinear", "Reshape"]

    def test_int8_through_concat_slice_split_gather_tile(self):
        net = Net()
        joined = net.add("Concat", [net.pair("x"), net.dq(net.q("x"))], axis=1)
        left, right = net.add("Split", [net.cut(joined, 0, 8, 1)], count=2, axis=1, num_outputs=2)
        net.matmul(net.pair(left), 8, "y0")
        index = net.constant("index", np.array([1, 0], np.int64))
        taken = net.add("Gather", [right, index], axis=1)
        net.matmul(
            net.pair(net.add("Tile", [taken, net.constant("reps", np.array([1, 2, 1], np.int64))])), 8, "y1"
        )
        after = fuse(net)
        assert counts(after)["QuantizeLinear"] == 1
        assert "Concat" in behind(after, "y1")

    def test_eight_bit_floats_do_not_go_through_what_onnx_has_not_for_them(self):
        net = Net(FP8)
        net.matmul(net.pair(net.add("Relu", [net.cut(net.pair("x"), 0, 3, 1)])), 8, "y0")
        net.matmul(net.pair(net.cut(net.dq(net.q("x", "a"), "a"), 0, 3, 1)), 8, "y1")
        assert counts(fuse(net))["QuantizeLinear"] == 3

    def test_other_scale_is_refused_with_its_reason(self):
        net = Net()
        net.matmul(net.pair(net.pair("x", "a", 0.03), "b", 0.04), 8, "y")
        assert counts(fuse(net))["QuantizeLinear"] == 2
        assert "scales or zero points differ" in reasons(net.model())[0]

    def test_per_channel_scales_follow_their_axis(self):
        net = Net()
        scales = np.linspace(0.01, 0.05, 6)
        moved = net.add("Transpose", [net.pair("x", "s", scales, axis=1)], perm=[1, 0, 2])
        flat = net.reshape(moved, [6, -1, 4, 2])
        net.matmul(net.pair(net.reshape(flat, [6, -1, 8]), "s", scales, axis=0), 8, "y")
        after = fuse(net)
        assert counts(after)["QuantizeLinear"] == 1
        dq = next(node for node in after.graph.node if node.op_type == "DequantizeLinear")
        assert helper.get_node_attr_value(dq, "axis") == 0

    @pytest.mark.parametrize("move", ["other axis", "mixed", "cut"])
    def test_per_channel_scales_on_another_axis_stay(self, move):
        net = Net(shape=(2, 6, 6))
        scales = np.linspace(0.01, 0.05, 6)
        x = net.pair("x", "s", scales, axis=1)
        if move == "other axis":
            x = net.add("Transpose", [x], perm=[0, 2, 1])
        elif move == "mixed":
            x = net.reshape(net.reshape(x, [-1, 36]), [-1, 2, 3, 6])
            x = net.reshape(net.add("Transpose", [x], perm=[0, 2, 1, 3]), [-1, 6, 6])
        else:
            x = net.add("Concat", [net.cut(x, 3, 6, 1), net.cut(x, 0, 3, 1)], axis=1)
        net.matmul(net.pair(x, "s", scales, axis=1), 6, "y")
        assert counts(fuse(net))["QuantizeLinear"] == 2

    def test_a_scale_that_loses_codes_is_refused(self):
        """float16 has no room for 448 times this scale, nor steps fine enough for 2^-9 times the other."""
        for value, keeps in ((200.0, False), (2e-7, False), (0.0371, True), (1 / 448, True)):
            net = Net(FP8, TensorProto.FLOAT16)
            net.matmul(net.pair(net.pair("x", "s", value), "s", value), 8, "y")
            graph = import_graph(onnx.shape_inference.infer_shapes(net.model()))
            dq = next(node for node in graph.nodes if node.op == "DequantizeLinear")
            assert survives_round_trip(dq) is keeps
            assert counts(Pipeline([FuseQdq()]).run(net.model()).model)["QuantizeLinear"] == 2 - keeps
            assert (reasons(net.model()) == []) is keeps

    def test_the_round_trip_agrees_with_onnx_runtime(self):
        """Every INT8 code, dequantized and quantized again by ONNX Runtime, where the check says it survives."""
        import onnxruntime as ort

        rng = np.random.default_rng(5)
        for wide in (FLOAT, TensorProto.FLOAT16):
            for value in rng.uniform(1e-3, 0.2, 20):
                net = Net(INT8, wide)
                net.outputs["q"] = INT8
                net.add("QuantizeLinear", [net.dq("x", "s", value), *net.scale("s", value)], "q")
                made = net.model()
                made.graph.input[0].type.tensor_type.elem_type = INT8
                codes = np.arange(-128, 128, dtype=np.int8).reshape(1, 32, 8)
                made.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 32
                graph = import_graph(onnx.shape_inference.infer_shapes(made))
                assert survives_round_trip(graph.nodes[0])
                options = ort.SessionOptions()
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                session = ort.InferenceSession(made.SerializeToString(), sess_options=options)
                np.testing.assert_array_equal(session.run(None, {"x": codes})[0], codes)


class TestShare:
    @TYPES
    def test_quantizers_behind_different_moves_become_one(self, kind):
        net = Net(kind)
        x = net.add("Relu", ["x"])
        net.matmul(net.pair(net.add("Transpose", [x], perm=[0, 2, 1])), 6, "y0")
        net.matmul(net.pair(net.reshape(x, [-1, 12])), 12, "y1")
        net.matmul(net.pair(x), 8, "y2")
        assert counts(fuse(net))["QuantizeLinear"] == 1

    def test_no_direct_reader_and_two_moves_deep(self):
        net = Net()
        x = net.add("Relu", ["x"])
        one = net.add("Transpose", [x], perm=[0, 2, 1])
        net.matmul(net.pair(one), 6, "y0")
        net.matmul(net.pair(net.reshape(one, [-1, 24])), 24, "y1")
        net.matmul(net.pair(net.reshape(x, [-1, 48])), 48, "y2")
        assert counts(fuse(net))["QuantizeLinear"] == 1

    def test_pieces_that_make_the_whole_are_quantized_as_the_whole(self):
        net = Net()
        pieces = net.add("Split", [net.add("Relu", ["x"])], count=3, axis=1, num_outputs=3)
        for index, piece in enumerate(pieces):
            net.matmul(net.pair(piece), 8, f"y{index}")
        after = fuse(net)
        assert counts(after) == {
            "Relu": 1,
            "QuantizeLinear": 1,
            "Split": 1,
            "DequantizeLinear": 3,
            "MatMul": 3,
        }

    def test_small_pieces_do_not_have_the_whole_quantized(self):
        net = Net()
        x = net.add("Relu", ["x"])
        for index in range(2):
            net.matmul(net.pair(net.cut(x, index, index + 2, 1)), 8, f"y{index}")
        assert counts(fuse(net))["QuantizeLinear"] == 2


class TestSink:
    @TYPES
    def test_a_pair_goes_behind_moves_to_its_product(self, kind):
        net = Net(kind)
        pair = net.pair(net.add("Relu", ["x"]))
        moved = net.reshape(net.cut(net.add("Transpose", [pair], perm=[0, 2, 1]), 2, 6, 1), [-1, 24])
        net.matmul(moved, 24, "y")
        assert ops(fuse(net)) == [
            "Relu", "Transpose", "Slice", "Reshape", "QuantizeLinear", "DequantizeLinear", "MatMul",
        ]  # fmt: skip

    @TYPES
    def test_pairs_in_front_of_concat_become_one(self, kind):
        net = Net(kind)
        joined = net.add(
            "Concat", [net.pair(net.add("Relu", ["x"])), net.pair(net.add("Neg", ["x"]))], axis=1
        )
        net.matmul(joined, 8, "y")
        after = fuse(net)
        assert counts(after)["QuantizeLinear"] == 1
        assert behind(after, "y")[:4] == ["MatMul", "DequantizeLinear", "QuantizeLinear", "Concat"]

    def test_concat_of_different_scales_is_refused(self):
        net = Net()
        net.matmul(net.add("Concat", [net.pair("x", "a", 0.03), net.pair("x", "b", 0.02)], axis=1), 8, "y")
        assert counts(fuse(net))["QuantizeLinear"] == 2
        assert reasons(net.model()) == ["what it reads is dequantized with scales that differ"]

    @TYPES
    def test_where_others_read_only_the_dequantizer_moves(self, kind):
        net = Net(kind)
        x = net.pair("x")
        net.add("Relu", [x], "r")
        net.outputs["r"] = FLOAT
        net.matmul(net.add("Transpose", [x], perm=[0, 2, 1]), 6, "y")
        after = fuse(net)
        assert counts(after)["QuantizeLinear"] == 1
        assert behind(after, "y") == ["MatMul", "DequantizeLinear", "Transpose", "QuantizeLinear"]
        assert behind(after, "r") == ["Relu", "DequantizeLinear", "QuantizeLinear"]

    @TYPES
    def test_split(self, kind):
        """ONNX splits INT8; of FP8 each piece gets its pair."""
        net = Net(kind)
        for index, piece in enumerate(net.add("Split", [net.pair("x")], count=2, axis=1, num_outputs=2)):
            net.matmul(piece, 8, f"y{index}")
        after = fuse(net)
        assert behind(after, "y1")[:2] == ["MatMul", "DequantizeLinear"]
        assert counts(after)["QuantizeLinear"] == (1 if kind == INT8 else 2)

    def test_what_does_not_lead_to_a_product_stays(self):
        net = Net()
        net.add("Relu", [net.add("Transpose", [net.pair("x")], perm=[0, 2, 1])], "y")
        net.outputs["y"] = FLOAT
        assert ops(fuse(net)) == ["QuantizeLinear", "DequantizeLinear", "Transpose", "Relu"]

    def test_what_grows_is_dequantized_behind(self):
        net = Net()
        wide = net.add("Tile", [net.pair("x"), net.constant("reps", np.array([1, 4, 1], np.int64))])
        net.matmul(wide, 8, "y")
        assert ops(fuse(net)) == ["QuantizeLinear", "Tile", "DequantizeLinear", "MatMul"]

    def test_weights_are_left_to_the_passes_that_fold_them(self):
        net = Net()
        net.tensors["w"] = np.random.default_rng(2).integers(-127, 127, (4, 8)).astype(np.int8)
        net.add("MatMul", ["x", net.add("Transpose", [net.dq("w")], perm=[1, 0])], "y")
        net.outputs["y"] = FLOAT
        assert ops(fuse(net)) == ["DequantizeLinear", "Transpose", "MatMul"]


class TestOutputs:
    def test_quantized_outputs_keep_their_name_type_and_place(self):
        net = Net()
        net.outputs["codes"] = INT8
        net.add("QuantizeLinear", [net.pair("x"), *net.scale("s", 0.03)], "codes")
        net.matmul(net.pair("x"), 8, "y")
        after = fuse(net)
        assert [(v.name, v.type.tensor_type.elem_type) for v in after.graph.output] == [
            ("codes", INT8),
            ("y", 1),
        ]

    def test_moved_outputs_stay_wide(self):
        net = Net()
        x = net.pair("x")
        moved = net.add("Transpose", [x], "moved", perm=[0, 2, 1])
        net.outputs["moved"] = FLOAT
        net.matmul(moved, 6, "y")
        after = fuse(net)
        assert behind(after, "moved")[0] == "DequantizeLinear"
        assert after.graph.output[0].type.tensor_type.elem_type == FLOAT

    def test_a_graph_without_quantizers_is_left_alone(self):
        net = Net()
        for index in range(2):
            net.matmul(net.add("Transpose", ["x"], perm=[0, 2, 1]), 6, f"y{index}")
        assert Pipeline([FuseQdq()]).run(net.model()).changed == 0

    def test_inside_a_subgraph(self):
        made = model(
            """g (float[2, 8] x, bool c) => (float[2, 8] y) {
                y = If (c) <
                    then_branch = yes () => (float[2, 8] a) {
                        q0 = QuantizeLinear(x, s, z)
                        d0 = DequantizeLinear(q0, s, z)
                        q1 = QuantizeLinear(d0, s, z)
                        a = DequantizeLinear(q1, s, z)
                    },
                    else_branch = no () => (float[2, 8] b) { b = Neg(x) }
                >
            }""",
            {"s": np.float32(0.03), "z": np.int8(0)},
        )
        after = apply(made, FuseQdq()).model
        body = after.graph.node[0].attribute[0].g
        assert [node.op_type for node in body.node] == ["QuantizeLinear", "DequantizeLinear"]
        check_same(
            made,
            after,
            {"x": np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32), "c": np.array(True)},
        )


class TestRandom:
    def test_every_network_gives_the_same_bits_for_fewer_quantizers(self):
        removed = moved = 0
        for seed in range(120):
            net = random_net(seed)
            before = net.model()
            before.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
            result = apply(before, FuseQdq())
            check_same(before, result.model, net.feeds(seed))
            was, now = (counts(m).get("QuantizeLinear", 0) for m in (before, result.model))
            removed += was - now
            moved += result.changed > 0
        assert removed > 100
        assert moved > 80

    def test_the_comparison_sees_a_wrong_scale(self):
        net = random_net(7)
        made = net.model()
        after = apply(made, FuseQdq()).model
        scale = next(t for t in after.graph.initializer if t.name == "a")
        scale.CopyFrom(numpy_helper.from_array(np.array(0.0302, np.float32), "a"))
        with pytest.raises(AssertionError):
            check_same(made, after, net.feeds(7))

    def test_work_grows_with_the_nodes(self):
        def work(layers: int) -> int:
            net = Net()
            x = "x"
            for _ in range(layers):
                x = net.add("Relu", [net.add("Transpose", [net.pair(x)], perm=[0, 1, 2])])
                net.matmul(net.pair(x), 8, f"y{len(net.nodes)}")
            graph = import_graph(onnx.shape_inference.infer_shapes(net.model()))
            return count_calls(lambda: FuseQdq().run(graph))

        assert work(80) < 2.6 * work(40)
