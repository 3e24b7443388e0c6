"""Probes for quantizers alone: Q/DQ of each type and form, and TensorRT's operators in each domain."""

from __future__ import annotations

import numpy as np
from onnx import helper

from tools.compat.net import BF16, E5M2, E8M0, F16, F32, FP4, FP8, INT4, INT8, UINT4, UINT8, Net
from tools.compat.probes import family

HPS = (F16, BF16, F32)
DOMAINS = ("trt", "ai.onnx", "my.domain")
KINDS = {"INT8": INT8, "FP8": FP8, "E5M2": E5M2}


def pair(net: Net, x: str, hp: int, kind: int, domain: str = "") -> str:
    """Q/DQ with one scale for the tensor."""
    s, z = net.scale(hp), net.zeros(kind)
    return net.op("DequantizeLinear", net.op("QuantizeLinear", x, s, z, domain=domain), s, z, domain=domain)


@family("Q/DQ", "weight and input", kind=("INT8", "FP8", "E5M2"), hp=HPS, form=("per tensor", "per channel"))
def linear(net: Net, kind: str, hp: int, form: str) -> None:
    """A linear layer with 8-bit weights and input."""
    x = pair(net, net.input(hp, "b", 64), hp, KINDS[kind])
    dims = (64,) if form == "per channel" else ()
    z = net.zeros(KINDS[kind], *dims)
    w = net.op("DequantizeLinear", net.weight(KINDS[kind], 64, 64), net.scale(hp, *dims), z, axis=1)
    net.output(net.op("MatMul", x, w), hp)


@family("Q/DQ", "weight only", kind=("INT8", "FP8"), hp=HPS)
def weight_only(net: Net, kind: str, hp: int) -> None:
    """A linear layer with 8-bit weights."""
    w = net.op("DequantizeLinear", net.weight(KINDS[kind], 64, 64), net.scale(hp))
    net.output(net.op("MatMul", net.input(hp, "b", 64), w), hp)


@family("Q/DQ", "constant, Q, DQ", kind=("INT8", "FP8"), hp=HPS)
def unfolded(net: Net, kind: str, hp: int) -> None:
    """A weight that is quantized in the graph."""
    net.output(
        net.op("MatMul", net.input(hp, "b", 64), pair(net, net.weight(hp, 64, 64), hp, KINDS[kind])), hp
    )


@family("Q/DQ", "Conv", kind=("INT8", "FP8"), hp=HPS)
def conv(net: Net, kind: str, hp: int) -> None:
    """A convolution with 8-bit weights per channel and input per tensor."""
    x, z = pair(net, net.input(hp, 1, 16, 8, 8), hp, KINDS[kind]), net.zeros(KINDS[kind], 16)
    w = net.op("DequantizeLinear", net.weight(KINDS[kind], 16, 16, 3, 3), net.scale(hp, 16), z, axis=0)
    net.output(net.op("Conv", x, w, net.weight(hp, 16), pads=[1] * 4), hp)


@family("Q/DQ", "FP8 Q/DQ alone", opset=(19, 20, 21, 23), hp=HPS)
def fp8_opsets(net: Net, hp: int) -> None:
    """Since when Q/DQ takes FLOAT8E4M3FN."""
    net.output(pair(net, net.input(hp, 2, 64), hp, FP8), hp)


@family("Q/DQ", "FP8 by output_dtype, no zero point", hp=HPS)
def fp8_by_attribute(net: Net, hp: int) -> None:
    """The type said by the attribute."""
    s = net.scale(hp)
    net.output(
        net.op("DequantizeLinear", net.op("QuantizeLinear", net.input(hp, 2, 64), s, output_dtype=FP8), s), hp
    )


@family("Q/DQ", "FP8, scale of another type", hp=(F16, BF16), form=("plain", "output_dtype"))
def fp8_wide_scale(net: Net, hp: int, form: str) -> None:
    """A float32 scale on a 16-bit input: allowed from opset 23 with output_dtype on DequantizeLinear."""
    s, z = net.scale(F32), net.zeros(FP8)
    q = net.op("QuantizeLinear", net.input(hp, 2, 64), s, z)
    y = net.op("DequantizeLinear", q, s, z, **({"output_dtype": hp} if form == "output_dtype" else {}))
    net.output(y, hp if form == "output_dtype" else F32)


@family("Q/DQ", "INT8 asymmetric", hp=HPS, zero_point=("UINT8", "INT8"))
def asymmetric(net: Net, hp: int, zero_point: str) -> None:
    """A zero point that is not zero."""
    s, z = net.scale(hp), net.constant(np.array(3, np.uint8 if zero_point == "UINT8" else np.int8))
    net.output(net.op("DequantizeLinear", net.op("QuantizeLinear", net.input(hp, 2, 64), s, z), s, z), hp)


@family("Q/DQ", "trt::QuantizeLinear, DequantizeLinear", kind=("INT8", "FP8"), hp=(F16, F32))
def retagged(net: Net, kind: str, hp: int) -> None:
    """Standard operators left in TensorRT's domain, as ModelOpt does."""
    net.output(pair(net, net.input(hp, 2, 64), hp, KINDS[kind], "trt"), hp)


@family("TensorRT's operators", "TRT_FP8QuantizeLinear, DequantizeLinear", hp=HPS, domain=DOMAINS)
def trt_fp8(net: Net, hp: int, domain: str) -> None:
    """FP8 as ModelOpt exports it, on input and weight."""
    where, s = domain.replace("ai.onnx", ""), net.scale(hp)
    x, w = net.input(hp, 2, 64), net.weight(hp, 64, 64)
    x, w = (net.op("TRT_FP8QuantizeLinear", t, s, domain=where) for t in (x, w))
    x, w = (net.op("TRT_FP8DequantizeLinear", t, s, domain=where) for t in (x, w))
    net.output(net.op("MatMul", x, w), hp)


@family("TensorRT's operators", "TRT_FP8DequantizeLinear", hp=HPS, weight=("FLOAT8E4M3FN", "UINT8"))
def trt_fp8_weight(net: Net, hp: int, weight: str) -> None:
    """A stored FP8 weight, typed or as plain bytes."""
    w = net.weight(FP8 if weight == "FLOAT8E4M3FN" else UINT8, 64, 64)
    w = net.op("TRT_FP8DequantizeLinear", w, net.scale(hp), domain="trt")
    net.output(net.op("MatMul", net.input(hp, 2, 64), w), hp)


@family("TensorRT's operators", "TRT_INT4DequantizeLinear", hp=HPS, domain=DOMAINS)
def trt_int4(net: Net, hp: int, domain: str) -> None:
    """INT4 blocks of 128 along axis 0."""
    where = domain.replace("ai.onnx", "")
    w, s = net.weight(INT4, 256, 64), net.scale(hp, 2, 64)
    w = net.op("TRT_INT4DequantizeLinear", w, s, domain=where, axis=0, block_size=128)
    net.output(net.op("MatMul", net.input(hp, 2, 256), w), hp)


@family(
    "TensorRT's operators", "trt::DequantizeLinear of INT4 blocks", hp=(F16, F32), form=("MatMul", "Conv")
)
def trt_int4_retagged(net: Net, hp: int, form: str) -> None:
    """As ModelOpt leaves INT4; of a convolution it quantizes an axis that is not the only blocked one."""
    if form == "MatMul":
        w = net.op(
            "DequantizeLinear",
            net.weight(INT4, 256, 64),
            net.scale(hp, 2, 64),
            domain="trt",
            axis=0,
            block_size=128,
        )
        net.output(net.op("MatMul", net.input(hp, 2, 256), w), hp)
        return
    w = net.weight(INT4, 16, 128, 2, 2)
    w = net.op("DequantizeLinear", w, net.scale(hp, 16, 1, 2, 2), domain="trt", axis=0, block_size=128)
    net.output(net.op("Conv", net.input(hp, 1, 128, 4, 4), w), hp)


@family("TensorRT's operators", "TRT_FP4DynamicQuantize", hp=HPS, opset=(20, 23), domain=DOMAINS)
def trt_fp4(net: Net, hp: int, domain: str) -> None:
    """The activation quantizer of NVFP4, dequantized in FLOAT."""
    s2 = net.scale(F32)
    where = domain.replace("ai.onnx", "")
    attributes = {"axis": -1, "block_size": 16, "scale_type": int(FP8)}
    y, s = net.ops(2, "TRT_FP4DynamicQuantize", net.input(hp, 2, 64), s2, domain=where, **attributes)
    scales = net.op("DequantizeLinear", s, s2)
    net.output(net.op("DequantizeLinear", y, scales, axis=-1, block_size=16), F32)


@family("TensorRT's operators", "TRT_FP4QDQ on a weight", hp=HPS)
def trt_fp4_dummy(net: Net, hp: int) -> None:
    """What ModelOpt writes before its exporter replaces it."""
    w = net.op("TRT_FP4QDQ", net.weight(hp, 64, 64), domain="trt", block_size=16)
    net.output(net.op("MatMul", net.input(hp, 2, 64), w), hp)


@family("TensorRT's operators", "TRT_DynamicQuantize", hp=(F16,))
def trt_dynamic(net: Net, hp: int) -> None:
    """A name that the parser knows, with the attributes of its FP4 sibling."""
    y, s = net.ops(
        2, "TRT_DynamicQuantize", net.input(hp, 2, 64), net.scale(F32), domain="trt", axis=-1, block_size=16
    )
    net.output(net.op("DequantizeLinear", y, s, axis=-1, block_size=16), hp)


@family("TensorRT's operators", "TRT_MXFP8DynamicQuantize, DequantizeLinear", hp=HPS, domain=DOMAINS)
def trt_mxfp8(net: Net, hp: int, domain: str) -> None:
    """The activation quantizer of MXFP8."""
    where, blocks = domain.replace("ai.onnx", ""), {"axis": -1, "block_size": 32}
    y, s = net.ops(
        2, "TRT_MXFP8DynamicQuantize", net.input(hp, 2, 64), domain=where, output_dtype=int(FP8), **blocks
    )
    net.output(net.op("TRT_MXFP8DequantizeLinear", y, s, domain=where, output_dtype=hp, **blocks), hp)


@family("Standard blocks", "QuantizeLinear to FP4, static scales, DequantizeLinear", hp=HPS)
def standard_fp4(net: Net, hp: int) -> None:
    """FP4 without TensorRT's operator."""
    s, blocks = net.scale(hp, 2, 4), {"axis": -1, "block_size": 16}
    q = net.op("QuantizeLinear", net.input(hp, 2, 64), s, output_dtype=FP4, **blocks)
    net.output(net.op("DequantizeLinear", q, s, **blocks), hp)


@family("Standard blocks", "DequantizeLinear with E8M0 scales")
def standard_mxfp8(net: Net) -> None:
    """MXFP8 without TensorRT's operator."""
    w, s = net.weight(FP8, 64, 64), net.weight(E8M0, 2, 64)
    w = net.op("DequantizeLinear", w, s, axis=0, block_size=32, output_dtype=F16)
    net.output(net.op("MatMul", net.input(F16, 2, 64), w), F16)


_CASTS = {"FP8": FP8, "E5M2": E5M2, "INT4": INT4, "UINT4": UINT4, "FP4": FP4, "E8M0": E8M0, "BF16": BF16}


@family("Standard blocks", "Cast to and fro", to=tuple(_CASTS))
def casts(net: Net, to: str) -> None:
    """Conversion from float16 and back."""
    narrow = net.op("Cast", net.input(F16, 2, 64), to=_CASTS[to])
    net.output(net.op("Cast", narrow, to=F16), F16)


@family("Standard blocks", "FP8 block 128 weight", hp=HPS, form=("axis 0", "axis 1, Transpose"))
def fp8_blocks(net: Net, hp: int, form: str) -> None:
    """FP8 weights in blocks of 128."""
    if form == "axis 0":
        w = net.op("DequantizeLinear", net.weight(FP8, 256, 64), net.scale(hp, 2, 64), axis=0, block_size=128)
    else:
        w = net.op("DequantizeLinear", net.weight(FP8, 64, 256), net.scale(hp, 64, 2), axis=1, block_size=128)
        w = net.op("Transpose", w, perm=[1, 0])
    net.output(net.op("MatMul", net.input(hp, 2, 256), w), hp)


@family("Standard blocks", "UINT4 block 32 weight", hp=HPS, form=("no zero point", "zero point"))
def uint4(net: Net, hp: int, form: str) -> None:
    """Unsigned 4-bit weights."""
    zero = [net.weight(UINT4, 2, 64)] if form == "zero point" else []
    w = net.op(
        "DequantizeLinear", net.weight(UINT4, 64, 64), net.scale(hp, 2, 64), *zero, axis=0, block_size=32
    )
    net.output(net.op("MatMul", net.input(hp, 2, 64), w), hp)


@family(
    "Standard blocks",
    "INT4 weight",
    hp=HPS,
    form=("per channel", "per tensor", "zero points", "pre-scaled input"),
)
def int4(net: Net, hp: int, form: str) -> None:
    """INT4 without blocks, with explicit zero points, behind AWQ's scaling of the input."""
    x, w = net.input(hp, 2, 64), net.weight(INT4, 64, 64)
    if form in ("per channel", "per tensor"):
        w = net.op("DequantizeLinear", w, net.scale(hp, *((64,) if form == "per channel" else ())), axis=1)
    else:
        zero = [net.zeros(INT4, 2, 64)] if form == "zero points" else []
        w = net.op("DequantizeLinear", w, net.scale(hp, 2, 64), *zero, axis=0, block_size=32)
    if form == "pre-scaled input":
        x = net.op("Mul", x, net.scale(hp, 64))
    net.output(net.op("MatMul", x, w), hp)


@family("Standard blocks", "sub-byte weight", kind=("INT2", "UINT2"), opset=(25,))
def two_bits(net: Net, kind: str) -> None:
    """The 2-bit types of opset 25."""
    from onnx import TensorProto

    values = net.rng.integers(0, 2, (64, 64)).astype(
        helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    )
    w = net.op("DequantizeLinear", net.constant(values), net.scale(F16, 2, 64), axis=0, block_size=32)
    net.output(net.op("MatMul", net.input(F16, 2, 64), w), F16)
