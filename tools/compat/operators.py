"""Probes for standard operators: opsets, types, matrix products, attention, norms, RoPE, activations."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tools.compat.net import BF16, BOOL, F16, F32, INT8, INT32, INT64, UINT8, Net
from tools.compat.probes import family

HPS = (F16, BF16, F32)


@family("Opsets", "MatMul", opset=(17, 20, 21, 22, 23, 24, 25, 26, 27, 28))
def opset(net: Net) -> None:
    """Which opset stamps are read at all."""
    net.output(net.op("MatMul", net.input(F16, "b", 64), net.weight(F16, 64, 64)), F16)


_PLAIN = (
    "FLOAT",
    "FLOAT16",
    "BFLOAT16",
    "DOUBLE",
    "BOOL",
    "INT8",
    "UINT8",
    "INT16",
    "UINT16",
    "INT32",
    "UINT32",
)
_PLAIN += ("INT64", "UINT64", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0")
_PLAIN += ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")


@family("Types", "Cast of a constant", opset=(25,), type=_PLAIN)
def types(net: Net, type: str) -> None:
    """Which element types a constant may have."""
    values = net.rng.integers(0, 2, (4, 8)).astype(
        helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(type))
    )
    y = net.op("Cast", net.constant(values), to=F16)
    net.output(net.op("Mul", y, net.input(F16, 4, 8)), F16)


@family("Matrix products", "MatMul", hp=HPS)
def matmul(net: Net, hp: int) -> None:
    """Two activations."""
    net.output(net.op("MatMul", net.input(hp, 2, 8, 64), net.input(hp, 2, 64, 8)), hp)


@family("Matrix products", "Gemm transB", hp=HPS)
def gemm(net: Net, hp: int) -> None:
    """A linear layer as one node."""
    net.output(
        net.op("Gemm", net.input(hp, "b", 64), net.weight(hp, 64, 64), net.weight(hp, 64), transB=1), hp
    )


@family("Matrix products", "Conv", hp=HPS, form=("2-D", "3-D", "transposed"))
def conv(net: Net, hp: int, form: str) -> None:
    """Convolutions."""
    sizes, kernel = ((4, 8, 8), (3, 3, 3)) if form == "3-D" else ((8, 8), (3, 3))
    op = "ConvTranspose" if form == "transposed" else "Conv"
    x = net.input(hp, 1, 16, *sizes)
    y = net.op(op, x, net.weight(hp, 16, 16, *kernel), net.weight(hp, 16), pads=[1] * 2 * len(kernel))
    net.output(y, hp)


@family("Matrix products", "MatMul of float16 and float32")
def mixed_matmul(net: Net) -> None:
    """Whether types may differ."""
    net.output(net.op("MatMul", net.input(F16, 2, 64), net.weight(F32, 64, 64)), F32)


@family("Matrix products", "Add of float16 and float32")
def mixed_add(net: Net) -> None:
    """Whether types may differ."""
    x = net.input(F16, 2, 64)
    net.output(net.op("Add", x, net.op("Cast", x, to=F32)), F32)


@family("Attention", "Attention", opset=(23, 24, 25), hp=HPS)
def attention(net: Net, hp: int) -> None:
    """The plain operator: 4-D, head size 64."""
    net.output(net.op("Attention", *[net.input(hp, 2, 4, 32, 64) for _ in range(3)]), hp)


_FORMS = ("3-D", "grouped queries", "causal", "scale", "float mask", "bool mask", "cross", "dynamic")
_FORMS += (
    "softcap",
    "softmax_precision",
    "four outputs",
    "cache",
    "q and k one tensor",
    "q, k, v one tensor",
)


@family("Attention", "Attention", hp=(F16, BF16), form=_FORMS)
def attention_form(net: Net, hp: int, form: str) -> None:
    """The operator with one of its options."""
    attributes = {
        "3-D": {"q_num_heads": 4, "kv_num_heads": 4},
        "causal": {"is_causal": 1},
        "scale": {"scale": 0.2},
        "softcap": {"softcap": 20.0},
        "softmax_precision": {"softmax_precision": F32},
    }.get(form, {})
    if form == "3-D":
        inputs = [net.input(hp, 2, 32, 256) for _ in range(3)]
    elif form == "dynamic":
        dims = (("b", 4, "t", 64), ("b", 4, "s", 64), ("b", 4, "s", 64))
        inputs = [net.input(hp, *d, low=2, usual=4, high=8) for d in dims]
    elif form.endswith("one tensor"):
        inputs = [net.input(hp, 2, 4, 32, 64)] * (2 if form.startswith("q and k") else 3)
        inputs += [net.input(hp, 2, 4, 32, 64)] * (3 - len(inputs))
    else:
        heads, length = (2 if form == "grouped queries" else 4), (77 if form == "cross" else 32)
        inputs = [net.input(hp, 2, 4, 32, 64), *(net.input(hp, 2, heads, length, 64) for _ in range(2))]
    if form.endswith("mask"):
        inputs.append(net.input(BOOL if form == "bool mask" else hp, 2, 1, 32, 32))
    if form == "cache":
        inputs += ["", net.input(hp, 2, 4, 8, 64), net.input(hp, 2, 4, 8, 64)]
    count = {"four outputs": 4, "cache": 3}.get(form, 1)
    for name in net.ops(count, "Attention", *inputs, **attributes):
        net.output(name, hp)


@family("Attention", "Attention", hp=HPS, head_size=(16, 32, 40, 72, 80, 96, 128, 160, 256, 512))
def attention_heads(net: Net, hp: int, head_size: int) -> None:
    """The head sizes that have a kernel."""
    net.output(net.op("Attention", *[net.input(hp, 1, 2, 32, head_size) for _ in range(3)]), hp)


@family("Attention", "MatMul, Softmax, MatMul", hp=HPS, head_size=(64, 512))
def decomposed(net: Net, hp: int, head_size: int) -> None:
    """Attention taken apart."""
    q, k, v = (net.input(hp, 1, 2, 32, head_size) for _ in range(3))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    net.output(net.op("MatMul", net.op("Softmax", scores, axis=-1), v), hp)


@family("Norms", "RMSNormalization", opset=(23, 24), hp=HPS)
def rms_norm(net: Net, hp: int) -> None:
    """Input and scale of one type."""
    net.output(net.op("RMSNormalization", net.input(hp, 2, 8, 64), net.weight(hp, 64)), hp)


@family("Norms", "RMSNormalization float16, scale float32")
def rms_norm_mixed(net: Net) -> None:
    """The output has the scale's type."""
    net.output(net.op("RMSNormalization", net.input(F16, 2, 8, 64), net.weight(F32, 64)), F32)


@family("Norms", "LayerNormalization", hp=HPS, affine=("scale and bias", "float32 scale and bias"))
def layer_norm(net: Net, hp: int, affine: str) -> None:
    """Scale and bias of the input's type, or of float32."""
    kind = F32 if affine.startswith("float32") else hp
    net.output(
        net.op("LayerNormalization", net.input(hp, 2, 8, 64), net.weight(kind, 64), net.weight(kind, 64)), hp
    )


@family("Norms", "GroupNormalization", opset=(18, 20, 21, 23), hp=HPS)
def group_norm(net: Net, opset: int, hp: int) -> None:
    """Scale and bias per group until opset 20, per channel from 21 on."""
    size = 4 if opset < 21 else 16
    x, scale, bias = net.input(hp, 1, 16, 8, 8), net.weight(hp, size), net.weight(hp, size)
    net.output(net.op("GroupNormalization", x, scale, bias, num_groups=4), hp)


@family("Norms", "InstanceNormalization", hp=HPS)
def instance_norm(net: Net, hp: int) -> None:
    """What older exports make of GroupNorm."""
    net.output(
        net.op("InstanceNormalization", net.input(hp, 1, 4, 256), net.weight(hp, 4), net.weight(hp, 4)), hp
    )


@family(
    "Norms", "RotaryEmbedding", hp=HPS, form=("4-D", "3-D", "interleaved", "position_ids", "part of the head")
)
def rope(net: Net, hp: int, form: str) -> None:
    """RoPE of opset 23."""
    x = net.input(hp, 2, 8, 256) if form == "3-D" else net.input(hp, 2, 4, 8, 64)
    half = 16 if form == "part of the head" else 32
    table = (8, half) if form == "position_ids" else (2, 8, half)
    inputs = [x, net.weight(hp, *table), net.weight(hp, *table)]
    inputs += [net.input(INT64, 2, 8)] if form == "position_ids" else []
    attributes = {
        "3-D": {"num_heads": 4},
        "interleaved": {"interleaved": 1},
        "part of the head": {"rotary_embedding_dim": 32},
    }
    net.output(net.op("RotaryEmbedding", *inputs, **attributes.get(form, {})), hp)


@family("Activations and others", "Gelu", hp=HPS, form=("none", "tanh"))
def gelu(net: Net, hp: int, form: str) -> None:
    """GELU, exact or by tanh."""
    net.output(net.op("Gelu", net.input(hp, 2, 64), approximate=form), hp)


@family("Activations and others", "Swish", opset=(24,), hp=HPS)
def swish(net: Net, hp: int) -> None:
    """SiLU as one node."""
    net.output(net.op("Swish", net.input(hp, 2, 64)), hp)


@family("Activations and others", "Resize", hp=HPS, form=("nearest", "linear"))
def resize(net: Net, hp: int, form: str) -> None:
    """Upsampling by two."""
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    net.output(net.op("Resize", net.input(hp, 1, 4, 8, 8), "", scales, mode=form), hp)


@family("Activations and others", "Einsum", hp=HPS)
def einsum(net: Net, hp: int) -> None:
    """An outer product, as position tables are made."""
    net.output(net.op("Einsum", net.input(hp, 8), net.weight(hp, 16), equation="i,j->ij"), hp)


@family("Activations and others", "float64: Cast, Mul, Cos")
def double(net: Net) -> None:
    """Position tables computed in float64."""
    x = net.op("Cast", net.input(F32, 8), to=TensorProto.DOUBLE)
    net.output(
        net.op("Cast", net.op("Cos", net.op("Mul", x, net.weight(TensorProto.DOUBLE, 8))), to=F32), F32
    )


@family("Activations and others", "If")
def condition(net: Net) -> None:
    """Control flow."""
    value = helper.make_tensor_value_info("then", F16, [2, 64])
    branches = {}
    for branch, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        value = helper.make_tensor_value_info(branch, F16, [2, 64])
        branches[branch] = helper.make_graph([helper.make_node(op, ["x1"], [branch])], branch, [], [value])
    flag, _ = net.input(BOOL), net.input(F16, 2, 64)
    net.output(net.op("If", flag, **branches), F16)


_SINGLES = {
    "BitwiseAnd": ([(INT32, 8), (INT32, 8)], {}, INT32),
    "MatMulInteger": ([(INT8, 4, 8), (INT8, 8, 4)], {}, INT32),
    "ConvInteger": ([(UINT8, 1, 4, 8, 8), (UINT8, 4, 4, 3, 3)], {}, INT32),
    "Unique": ([(F32, 8)], {}, F32),
    "NonZero": ([(F32, 4, 4)], {}, INT64),
    "CumSum": ([(F32, 4, 4), 0], {}, F32),
    "Trilu": ([(F16, 4, 4)], {}, F16),
    "TopK": ([(F32, 4, 8), [2]], {}, F32),
    "DFT": ([(F32, 1, 8, 1)], {}, F32),
    "Col2Im": ([(F32, 1, 5, 5), [5, 5], [1, 5]], {}, F32),
    "GridSample": ([(F32, 1, 2, 4, 4), (F32, 1, 3, 3, 2)], {}, F32),
    "AffineGrid": ([(F32, 1, 2, 3), [1, 2, 4, 4]], {}, F32),
    "DeformConv": ([(F32, 1, 2, 4, 4), (F32, 2, 2, 3, 3), (F32, 1, 18, 2, 2)], {}, F32),
    "ScatterND": ([(F16, 4, 8), [[1]], (F16, 1, 8)], {}, F16),
    "GatherElements": ([(F16, 4, 8), [[1, 0]]], {}, F16),
    "Mish": ([(F16, 2, 8)], {}, F16),
    "HardSwish": ([(F16, 2, 8)], {}, F16),
    "DynamicQuantizeLinear": ([(F32, 4, 8)], {}, UINT8),
}  # op: inputs (type and dims of an input, or values of an int64 constant), attributes, type of the first output


@family("Activations and others", "operator", op=tuple(_SINGLES))
def single(net: Net, op: str) -> None:
    """One node of an operator that some exporters write."""
    inputs, attributes, kind = _SINGLES[op]
    names = [net.input(*i) if isinstance(i, tuple) else net.constant(np.array(i, np.int64)) for i in inputs]
    count = len(
        [
            o
            for o in onnx.defs.get_schema(op, 23).outputs
            if o.option == onnx.defs.OpSchema.FormalParameterOption.Single
        ]
    )
    net.output(net.ops(count, op, *names, **attributes)[0], kind)


@family("Activations and others", "SplitToSequence, ConcatFromSequence")
def sequence(net: Net) -> None:
    """Sequences of tensors, as torch.chunk and stack are exported sometimes."""
    parts = net.op("SplitToSequence", net.input(F16, 4, 8), axis=0)
    net.output(net.op("ConcatFromSequence", parts, axis=0), F16)
