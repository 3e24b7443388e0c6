"""Probes for operators of other domains: ONNX Runtime's own, TensorRT's attention, functions of the model."""

from __future__ import annotations

import numpy as np
from onnx import helper

from tools.compat.net import BF16, F16, F32, FP8, INT8, UINT8, Net
from tools.compat.probes import family

HPS = (F16, BF16, F32)
MS = "com.microsoft"


@family("com.microsoft", "SkipLayerNormalization", hp=(F16, F32), domain=(MS,))
def skip_norm(net: Net, hp: int) -> None:
    """ONNX Runtime's fused operator."""
    x, skip = net.input(hp, 2, 8, 64), net.input(hp, 2, 8, 64)
    net.output(
        net.op("SkipLayerNormalization", x, skip, net.weight(hp, 64), net.weight(hp, 64), domain=MS), hp
    )


@family("com.microsoft", "SkipSimplifiedLayerNormalization", hp=(F16, F32), domain=(MS,))
def skip_rms_norm(net: Net, hp: int) -> None:
    """ONNX Runtime's fused operator."""
    x, skip = net.input(hp, 2, 8, 64), net.input(hp, 2, 8, 64)
    net.output(net.op("SkipSimplifiedLayerNormalization", x, skip, net.weight(hp, 64), domain=MS), hp)


@family("com.microsoft", "SimplifiedLayerNormalization", hp=(F16, F32), domain=("ai.onnx", MS))
def simplified_norm(net: Net, hp: int, domain: str) -> None:
    """RMSNormalization before opset 23; ONNX Runtime has it in the default domain."""
    x, where = net.input(hp, 2, 8, 64), domain.replace("ai.onnx", "")
    net.output(net.op("SimplifiedLayerNormalization", x, net.weight(hp, 64), domain=where, axis=-1), hp)


@family("com.microsoft", "activation", hp=(F16, F32), op=("Gelu", "FastGelu", "QuickGelu", "BiasGelu"))
def ms_gelu(net: Net, hp: int, op: str) -> None:
    """ONNX Runtime's own activations."""
    bias = [net.weight(hp, 64)] if op in ("BiasGelu", "FastGelu") else []
    net.output(net.op(op, net.input(hp, 2, 64), *bias, domain=MS), hp)


@family("com.microsoft", "MultiHeadAttention", hp=(F16, F32), domain=(MS,))
def ms_attention(net: Net, hp: int) -> None:
    """ONNX Runtime's attention."""
    net.output(
        net.op("MultiHeadAttention", *[net.input(hp, 2, 32, 256) for _ in range(3)], domain=MS, num_heads=4),
        hp,
    )


@family("com.microsoft", "GroupQueryAttention", hp=(F16, F32), domain=(MS,))
def ms_grouped(net: Net, hp: int) -> None:
    """ONNX Runtime's attention with a cache."""
    q, k, v = (net.input(hp, 1, 8, 256) for _ in range(3))
    past = [net.input(hp, 1, 4, 8, 64) for _ in range(2)]
    lengths = [net.constant(np.array([[7]], np.int32)), net.constant(np.array(8, np.int32))]
    out = net.ops(3, "GroupQueryAttention", q, k, v, *past, *lengths, domain=MS, num_heads=4, kv_num_heads=4)
    for name in out:
        net.output(name, hp)


@family("com.microsoft", "RotaryEmbedding", hp=(F16, F32), domain=(MS,))
def ms_rope(net: Net, hp: int) -> None:
    """ONNX Runtime's RoPE."""
    positions = net.constant(np.array([[0, 1, 2, 3, 4, 5, 6, 7]], np.int64))
    x = net.input(hp, 1, 4, 8, 64)
    net.output(
        net.op("RotaryEmbedding", x, positions, net.weight(hp, 8, 32), net.weight(hp, 8, 32), domain=MS), hp
    )


@family("com.microsoft", "GroupNorm", hp=(F16, F32), domain=(MS,))
def ms_group_norm(net: Net, hp: int) -> None:
    """ONNX Runtime's channels-last GroupNorm with SiLU."""
    x, scale, bias = net.input(hp, 1, 8, 8, 16), net.weight(F32, 16), net.weight(F32, 16)
    net.output(net.op("GroupNorm", x, scale, bias, domain=MS, groups=4, activation=1), hp)


@family("com.microsoft", "NhwcConv", hp=(F16, F32), domain=(MS,))
def ms_conv(net: Net, hp: int) -> None:
    """ONNX Runtime's channels-last convolution."""
    net.output(net.op("NhwcConv", net.input(hp, 1, 8, 8, 16), net.weight(hp, 16, 3, 3, 16), domain=MS), hp)


@family("com.microsoft", "FusedMatMul", hp=(F16, F32), domain=(MS,))
def ms_matmul(net: Net, hp: int) -> None:
    """MatMul with alpha and transposes."""
    net.output(net.op("FusedMatMul", net.input(hp, 2, 64), net.weight(hp, 64, 64), domain=MS, transB=1), hp)


@family("com.microsoft", "MatMulNBits", hp=(F16, F32), domain=(MS,))
def ms_nbits(net: Net, hp: int) -> None:
    """ONNX Runtime's INT4 matrix product, block size 32."""
    packed, scale = net.weight(UINT8, 64, 2, 16), net.scale(hp, 128)
    x = net.input(hp, 2, 64)
    net.output(net.op("MatMulNBits", x, packed, scale, domain=MS, K=64, N=64, bits=4, block_size=32), hp)


@family("com.microsoft", "QuantizeLinear, DequantizeLinear", hp=(F16, F32), domain=(MS,))
def ms_quantize(net: Net, hp: int) -> None:
    """INT8 Q/DQ in ONNX Runtime's domain."""
    s, z = net.scale(hp), net.zeros(INT8)
    x = net.input(hp, 2, 64)
    net.output(net.op("DequantizeLinear", net.op("QuantizeLinear", x, s, z, domain=MS), s, z, domain=MS), hp)


@family("Functions", "function of the model", name=("my::Scaled", "trt::Scaled"))
def function(net: Net, name: str) -> None:
    """A function that the model brings along."""
    domain, op = name.split("::")
    body = [helper.make_node("Mul", ["a", "b"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    opsets = [helper.make_opsetid("", 23)]
    net.functions.append(helper.make_function(domain, op, ["a", "b"], ["y"], body, opsets))
    net.output(net.op(op, net.input(F16, 2, 64), net.weight(F16, 64), domain=domain), F16)


@family("Functions", "functions for trt::TRT_FP8QuantizeLinear and DequantizeLinear", hp=HPS)
def fp8_functions(net: Net, hp: int) -> None:
    """TensorRT's operators, with bodies of standard ones."""
    zero = helper.make_tensor("z", FP8, [], b"\0", raw=True)
    bodies = {"TRT_FP8QuantizeLinear": "QuantizeLinear", "TRT_FP8DequantizeLinear": "DequantizeLinear"}
    for op, standard in bodies.items():
        body = [
            helper.make_node("Constant", [], ["z"], value=zero),
            helper.make_node(standard, ["x", "s", "z"], ["y"]),
        ]
        opsets = [helper.make_opsetid("", 23)]
        net.functions.append(helper.make_function("trt", op, ["x", "s"], ["y"], body, opsets))
    s = net.scale(hp)
    q = net.op("TRT_FP8QuantizeLinear", net.input(hp, 2, 64), s, domain="trt")
    net.output(net.op("TRT_FP8DequantizeLinear", q, s, domain="trt"), hp)


@family("Functions", "trt::TRT_Attention", hp=HPS)
def trt_attention(net: Net, hp: int) -> None:
    """TensorRT's attention without attributes."""
    net.output(net.op("TRT_Attention", *[net.input(hp, 2, 4, 32, 64) for _ in range(3)], domain="trt"), hp)
