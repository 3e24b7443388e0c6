"""Probes for whole layers in each format: the forms a weight may be stored in, FP8 attention, what the engine keeps."""

from __future__ import annotations

import numpy as np
from onnx import helper

from tools.compat.net import BF16, F16, F32, FP4, FP8, INT4, INT8, Net
from tools.compat.probes import family
from tools.compat.quantizers import pair

HPS = (F16, BF16, F32)
LAYOUTS = ("[N,K] and Transpose", "[K,N]", "Gemm transB")


def product(net: Net, x: str, w: str, hp: int, layout: str, size: int = 64) -> str:
    """The linear layer behind a dequantized weight that is stored in `layout`."""
    if layout == "Gemm transB":
        return net.op("Gemm", x, w, net.weight(hp, size), transB=1)
    if layout == "[N,K] and Transpose":
        w = net.op("Transpose", w, perm=[1, 0])
    return net.op("Add", net.op("MatMul", x, w), net.weight(hp, size))


def rows(net: Net, hp: int, form: str, k: int) -> str:
    """The input of a layer: 8 rows, a dynamic batch of sequences, or a dynamic last dim."""
    if form == "dynamic last dim":
        return net.input(hp, 8, "k", low=32, usual=64, high=64)
    return net.input(hp, *(("b", "t", k) if form.startswith("dynamic") else (8, k)))


def blocked(layout: str, k: int, n: int, block: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Dims of the weight, dims of its scales, and the axis that is blocked; a last block may be partial."""
    count = -(-k // block)
    return ((k, n), (count, n), 0) if layout == "[K,N]" else ((n, k), (n, count), 1)


DEQUANTIZERS = (
    "FLOAT, then Cast",
    "scales cast",
    "first DQ output_dtype",
    "second DQ output_dtype",
    "s2 in hp",
)


def nvfp4_pair(net: Net, y: str, s: str, s2: str, hp: int, form: str, axis: int = -1) -> str:
    """The two DequantizeLinear of NVFP4, brought to `hp` in one of the ways."""
    first = {"output_dtype": hp} if form == "first DQ output_dtype" else {}
    second = {"output_dtype": hp} if form == "second DQ output_dtype" else {}
    scales = net.op("DequantizeLinear", s, s2, **first)
    if form == "scales cast":
        scales = net.op("Cast", scales, to=hp)
    w = net.op("DequantizeLinear", y, scales, axis=axis, block_size=16, **second)
    return net.op("Cast", w, to=hp) if form == DEQUANTIZERS[0] and hp != F32 else w


def nvfp4_input(net: Net, x: str, s2: str, hp: int, form: str = DEQUANTIZERS[0]) -> str:
    """The dynamic quantizer of NVFP4 and what dequantizes behind it."""
    blocks = {"axis": -1, "block_size": 16, "scale_type": int(FP8)}
    y, s = net.ops(2, "TRT_FP4DynamicQuantize", x, s2, domain="trt", **blocks)
    return nvfp4_pair(net, y, s, s2, hp, form)


def nvfp4_weight(
    net: Net, hp: int, layout: str, form: str = DEQUANTIZERS[0], k: int = 64, n: int = 64
) -> str:
    """A stored NVFP4 weight, dequantized."""
    weight, scales, axis = blocked(layout, k, n, 16)
    s2 = net.scale(hp if form == "s2 in hp" else F32)
    return nvfp4_pair(net, net.weight(FP4, *weight), net.scale(FP8, *scales), s2, hp, form, axis)


@family("NVFP4", "W4A4", hp=HPS, layout=LAYOUTS, dequantized=DEQUANTIZERS)
def nvfp4(net: Net, hp: int, layout: str, dequantized: str) -> None:
    """Weight and input in FP4 blocks of 16."""
    s2 = net.scale(hp if dequantized == "s2 in hp" else F32)
    x = nvfp4_input(net, net.input(hp, 8, 64), s2, hp, dequantized)
    net.output(product(net, x, nvfp4_weight(net, hp, layout, dequantized), hp, layout), hp)


_NVFP4_FORMS = ("weight only", "s2 [1]", "input cast to FLOAT", "constant not folded", "low-rank branch")
_NVFP4_FORMS += ("dynamic batch and sequence", "dynamic last dim", "K 48, N 61", "K 40")


@family("NVFP4", "W4A4", hp=HPS, form=_NVFP4_FORMS)
def nvfp4_form(net: Net, hp: int, form: str) -> None:
    """The canonical form with one thing changed."""
    layout, n = LAYOUTS[0], 61 if form == "K 48, N 61" else 64
    k = {"K 48, N 61": 48, "K 40": 40}.get(form, 64)
    x = rows(net, hp, form, k)
    scaled = net.op("Mul", x, net.scale(hp, 64)) if form == "low-rank branch" else x
    wide = net.op("Cast", scaled, to=F32) if form == "input cast to FLOAT" and hp != F32 else scaled
    s2 = net.scale(F32, *([1] if form == "s2 [1]" else []))
    quantized = scaled if form == "weight only" else nvfp4_input(net, wide, s2, hp)
    if form == "constant not folded":
        w = nvfp4_input(net, net.weight(hp, n, k), net.scale(F32), hp)
    else:
        w = net.weight(hp, n, k) if form == "K 40" else nvfp4_weight(net, hp, layout, k=k, n=n)
    y = product(net, quantized, w, hp, layout, n)
    if form == "low-rank branch":
        low = net.op("MatMul", net.op("MatMul", scaled, net.weight(hp, 64, 16)), net.weight(hp, 16, 64))
        y = net.op("Add", y, low)
    net.output(y, hp)


_LAYERS = ("other global scales", "one global scale", "one global scale, biases")


@family("NVFP4", "W4A4 of keys and values, FP8 attention", layers=_LAYERS, hp=HPS)
def nvfp4_attention(net: Net, layers: str, hp: int) -> None:
    """Two layers on one input whose outputs become heads, which FP8 attention reads (see add-zero-bias)."""
    x = nvfp4_input(net, net.input(hp, 2, 32, 128), net.scale(F32), hp)
    q = pair(net, net.input(hp, 2, 2, 32, 64), hp, FP8)
    shape, scales, sides = net.constant(np.array([0, 0, 2, 64])), [net.scale(F32), net.scale(F32)], []
    for perm, own in (([0, 2, 3, 1], scales[0]), ([0, 2, 1, 3], scales[1])):
        s2 = own if layers == _LAYERS[0] else scales[0]
        w = nvfp4_pair(net, net.weight(FP4, 128, 128), net.scale(FP8, 128, 8), s2, hp, DEQUANTIZERS[0])
        y = net.op("MatMul", x, net.op("Transpose", w, perm=[1, 0]))
        y = net.op("Add", y, net.weight(hp, 128)) if layers == _LAYERS[2] else y
        sides.append(pair(net, net.op("Transpose", net.op("Reshape", y, shape), perm=perm), hp, FP8))
    weights = pair(net, net.op("Softmax", net.op("MatMul", q, sides[0]), axis=-1), hp, FP8)
    net.output(net.op("MatMul", weights, sides[1]), hp)


@family("NVFP4", "weight with other scales", hp=HPS, form=("one level, hp", "blocks of 32", "per tensor"))
def nvfp4_other(net: Net, hp: int, form: str) -> None:
    """FP4 weights that are not NVFP4."""
    w = net.weight(FP4, 64, 64)
    if form == "per tensor":
        w = net.op("DequantizeLinear", w, net.scale(hp))
    else:
        block = 32 if form == "blocks of 32" else 16
        w = net.op("DequantizeLinear", w, net.scale(hp, 64 // block, 64), axis=0, block_size=block)
    net.output(net.op("MatMul", net.input(hp, 8, 64), w), hp)


def mxfp8_input(net: Net, x: str, out: int) -> str:
    """The dynamic quantizer of MXFP8 and its dequantizer."""
    blocks = {"domain": "trt", "axis": -1, "block_size": 32}
    y, s = net.ops(2, "TRT_MXFP8DynamicQuantize", x, output_dtype=int(FP8), **blocks)
    return net.op("TRT_MXFP8DequantizeLinear", y, s, output_dtype=out, **blocks)


def mxfp8_weight(net: Net, out: int, layout: str, k: int = 64, n: int = 64) -> str:
    """A stored MXFP8 weight with UINT8 scales, dequantized."""
    weight, scales, axis = blocked(layout, k, n, 32)
    s = net.constant(net.rng.integers(118, 124, scales).astype(np.uint8))
    attributes = {"axis": axis, "block_size": 32, "output_dtype": out}
    return net.op("TRT_MXFP8DequantizeLinear", net.weight(FP8, *weight), s, domain="trt", **attributes)


@family("MXFP8", "W8A8", hp=HPS, out=HPS, layout=LAYOUTS)
def mxfp8(net: Net, hp: int, out: int, layout: str) -> None:
    """Weight and input in FP8 blocks of 32; `out` is output_dtype."""
    x = mxfp8_input(net, net.input(hp, 8, 64), out)
    net.output(product(net, x, mxfp8_weight(net, out, layout), out, layout), out)


_MXFP8_FORMS = (
    "weight only",
    "constant not folded",
    "dynamic batch and sequence",
    "dynamic last dim",
    "K 48",
)


@family("MXFP8", "W8A8", hp=HPS, form=_MXFP8_FORMS)
def mxfp8_form(net: Net, hp: int, form: str) -> None:
    """The canonical form with one thing changed."""
    x = rows(net, hp, form, 48 if form == "K 48" else 64)
    x = x if form == "weight only" else mxfp8_input(net, x, hp)
    if form == "constant not folded":
        w = mxfp8_input(net, net.weight(hp, 64, 64), hp)
    else:
        w = net.weight(hp, 64, 48) if form == "K 48" else mxfp8_weight(net, hp, LAYOUTS[0])
    net.output(product(net, x, w, hp, LAYOUTS[0]), hp)


def int4_weight(net: Net, hp: int, layout: str, k: int, block: int = 128, n: int = 64) -> str:
    """A stored INT4 weight in blocks, dequantized."""
    weight, scales, axis = blocked(layout, k, n, block)
    return net.op(
        "DequantizeLinear", net.weight(INT4, *weight), net.scale(hp, *scales), axis=axis, block_size=block
    )


@family("INT4", "weight", hp=HPS, layout=LAYOUTS, K=(64, 192, 256), block=(128,))
@family("INT4", "weight", hp=HPS, layout=LAYOUTS, K=(256,), block=(16, 32, 64))
def int4(net: Net, hp: int, layout: str, K: int, block: int) -> None:
    """INT4 weights in blocks along K; the last block may be partial."""
    x = net.input(hp, 8, K)
    net.output(product(net, x, int4_weight(net, hp, layout, K, block), hp, layout), hp)


@family("INT4", "W4A8", hp=HPS, layout=LAYOUTS, K=(192, 256), block=(128,))
@family("INT4", "W4A8", hp=HPS, layout=LAYOUTS, K=(256,), block=(32, 64))
def w4a8(net: Net, hp: int, layout: str, K: int, block: int) -> None:
    """INT4 weights, then FP8 Q/DQ on weight and input."""
    x = pair(net, net.input(hp, 8, K), hp, FP8)
    w = pair(net, int4_weight(net, hp, layout, K, block), hp, FP8)
    net.output(product(net, x, w, hp, layout), hp)


_ATTENTION = ("Attention", "Attention, Q/DQ on the output", "Attention, dynamic", "MatMul, Softmax, MatMul")
_ATTENTION += ("MatMul, Softmax, Q/DQ, MatMul",)


@family("FP8 attention", "Q/DQ on q, k, v", form=_ATTENTION, hp=HPS, head_size=(40, 64, 72, 128))
def fp8_attention(net: Net, form: str, hp: int, head_size: int) -> None:
    """Attention on FP8 inputs, as one node or taken apart."""
    length = "t" if form == "Attention, dynamic" else 32
    q, k, v = (
        pair(net, net.input(hp, 2, 4, length, head_size, low=8, usual=16, high=32), hp, FP8) for _ in range(3)
    )
    if form.startswith("Attention"):
        y = net.op("Attention", q, k, v)
        net.output(pair(net, y, hp, FP8) if form.endswith("output") else y, hp)
        return
    factor = net.constant(np.array(head_size**-0.5).astype(helper.tensor_dtype_to_np_dtype(hp)))
    scores = net.op("Mul", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), factor)
    weights = net.op("Softmax", scores, axis=-1)
    weights = pair(net, weights, hp, FP8) if "Q/DQ" in form else weights
    net.output(net.op("MatMul", weights, v), hp)


_SIDE = 1024
_STORED = ("plain", "INT8", "FP8", "FP8 in the graph", "INT4", "W4A8", "NVFP4", "NVFP4 in the graph")
_STORED += ("MXFP8", "MXFP8 in the graph")


@family("What the engine keeps", "layer of 1024 x 1024", weights=_SIDE * _SIDE, stored=_STORED, hp=(F16, F32))
def kept(net: Net, stored: str, hp: int) -> None:
    """Engine bits per weight, everything included: whether a weight stays as small as it is stored."""
    size, layout = (_SIDE, _SIDE), LAYOUTS[0]
    x = net.input(hp, 8, _SIDE)
    if stored == "plain":
        w = net.weight(hp, *size)
    elif stored == "INT8":
        w = net.op(
            "DequantizeLinear", net.weight(INT8, *size), net.scale(hp, _SIDE), net.zeros(INT8, _SIDE), axis=0
        )
    elif stored.startswith("FP8"):
        x = pair(net, x, hp, FP8)
        stays = stored == "FP8"
        w = (
            net.op("DequantizeLinear", net.weight(FP8, *size), net.scale(hp))
            if stays
            else pair(net, net.weight(hp, *size), hp, FP8)
        )
    elif stored in ("INT4", "W4A8"):
        w = int4_weight(net, hp, layout, _SIDE, n=_SIDE)
        x, w = (pair(net, t, hp, FP8) for t in (x, w)) if stored == "W4A8" else (x, w)
    elif stored.startswith("NVFP4"):
        x, inside = nvfp4_input(net, x, net.scale(F32), hp), stored != "NVFP4"
        constant = net.weight(hp, *size) if inside else ""
        w = (
            nvfp4_input(net, constant, net.scale(F32), hp)
            if inside
            else nvfp4_weight(net, hp, layout, k=_SIDE, n=_SIDE)
        )
    else:
        x = mxfp8_input(net, x, hp)
        w = (
            mxfp8_weight(net, hp, layout, _SIDE, _SIDE)
            if stored == "MXFP8"
            else mxfp8_input(net, net.weight(hp, *size), hp)
        )
    net.output(product(net, x, w, hp, layout, _SIDE), hp)
