"""TensorRT's quantization operators as functions of ONNX's own, for runtimes that do not have them.

The bodies compute in float32, whatever comes in, and give the bits of `passes.weights.block_operations`. They are
written in ONNX's text form; `@name` is an attribute of the node that calls.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import FunctionProto

from passes.graph.trt_ops import DOMAIN

# x [..., K] -> blocks [..., K / block_size, block_size] in float32; Reshape fails where K is not whole blocks.
_BLOCKS = """
    shape = Shape(x)
    outer = Shape<end = -1>(x)
    last = Shape<start = -1>(x)
    size = Constant<value_int: int = @block_size>()
    count = Div(last, size)
    block_shape = Concat<axis = 0>(outer, count)
    one_1d = Constant<value_ints = [1]>()
    size_1d = Mul(size, one_1d)
    blocked = Concat<axis = 0>(block_shape, size_1d)
    wide = Cast<to = 1>(x)
    blocks = Reshape(wide, blocked)
    last_axis = Constant<value_ints = [-1]>()
"""
_AMAX = """
    sizes = Abs(blocks)
    amax = ReduceMax<keepdims = 1>(sizes, last_axis)
"""
# amax [..., 1], s2_given [] -> steps (E4M3 block scales) and fp4 (E2M1 values), both in float32. Below 2 the values
# lie 0.5 apart, below 4 1, then 2; Round takes ties to even.
_NVFP4 = """
    zero = Constant<value_float = 0.0>()
    smallest = Constant<value_float = 1e-12>()
    positive = Greater(s2_given, zero)
    s2 = Where(positive, s2_given, smallest)
    six = Constant<value_float = 6.0>()
    largest_step = Mul(six, s2)
    ratio = Div(amax, largest_step)
    bound = Constant<value_float = 448.0>()
    capped = Min(ratio, bound)
    e4m3 = Cast<to = 17>(capped)
    steps = Cast<to = 1>(e4m3)
    scaled_steps = Mul(steps, s2)
    threshold = Constant<value_float = 1e-5>()
    usable = GreaterOrEqual(scaled_steps, threshold)
    one = Constant<value_float = 1.0>()
    divisor = Where(usable, scaled_steps, one)
    quotient = Div(blocks, divisor)
    minus_six = Neg(six)
    clipped = Clip(quotient, minus_six, six)
    magnitude = Abs(clipped)
    two = Constant<value_float = 2.0>()
    four = Constant<value_float = 4.0>()
    half = Constant<value_float = 0.5>()
    below_two = Less(magnitude, two)
    below_four = Less(magnitude, four)
    upper_gap = Where(below_four, one, two)
    gap = Where(below_two, half, upper_gap)
    gaps = Div(clipped, gap)
    rounded = Round(gaps)
    fp4 = Mul(rounded, gap)
"""
# amax [..., 1] -> index, the exponent + 127 of ceil(log2(amax / 448)). The logarithm may be off by one around powers of
# two; the comparisons with the two powers next to it are exact.
_E8M0 = """
    bound = Constant<value_float = 448.0>()
    ratio = Div(amax, bound)
    zero = Constant<value_float = 0.0>()
    finite_bound = Constant<value_float = 1e38>()
    positive = Greater(amax, zero)
    finite = Less(ratio, finite_bound)
    usable = And(positive, finite)
    one = Constant<value_float = 1.0>()
    safe = Where(usable, ratio, one)
    log = Log(safe)
    log_of_two = Constant<value_float = 0.6931472>()
    log2 = Div(log, log_of_two)
    guess = Ceil(log2)
    lowest = Constant<value_float = -127.0>()
    highest = Constant<value_float = 127.0>()
    bounded = Clip(guess, lowest, highest)
    biased = Sub(bounded, lowest)
    guessed = Cast<to = 7>(biased)
    first = Constant<value_int = 0>()
    final = Constant<value_int = 254>()
    next = Constant<value_int = 1>()
    before = Sub(guessed, next)
    lower = Clip(before, first, final)
    power = Gather(powers, guessed)
    lower_power = Gather(powers, lower)
    is_above = Greater(safe, power)
    is_below = LessOrEqual(safe, lower_power)
    up = Cast<to = 7>(is_above)
    down = Cast<to = 7>(is_below)
    raised = Add(guessed, up)
    corrected = Sub(raised, down)
    index = Clip(corrected, first, final)
"""

_LINEAR = "axis: int = 1, block_size: int = 0"
_QUANTIZE = f"""<{_LINEAR}>(x, scale) => (y) {{
    wide = Cast<to = 1>(x)
    wide_scale = Cast<to = 1>(scale)
    y = QuantizeLinear<axis: int = @axis, block_size: int = @block_size, output_dtype = %d>(wide, wide_scale)
}}"""
_DEQUANTIZE = f"""<{_LINEAR}>(x, scale) => (y) {{
    wide_scale = Cast<to = 1>(scale)
    wide = DequantizeLinear<axis: int = @axis, block_size: int = @block_size>(x, wide_scale)
    y = CastLike(wide, scale)
}}"""

BODIES: dict[str, str] = {
    "TRT_FP8QuantizeLinear": _QUANTIZE % onnx.TensorProto.FLOAT8E4M3FN,
    "TRT_FP8DequantizeLinear": _DEQUANTIZE,
    "TRT_INT4QuantizeLinear": _QUANTIZE % onnx.TensorProto.INT4,
    "TRT_INT4DequantizeLinear": _DEQUANTIZE,
    "QuantizeLinear": f"""<{_LINEAR}, output_dtype: int = 0, saturate: int = 1>(x, scale, zero_point) => (y) {{
        wide = Cast<to = 1>(x)
        wide_scale = Cast<to = 1>(scale)
        y = QuantizeLinear<axis: int = @axis, block_size: int = @block_size, output_dtype: int = @output_dtype,
                           saturate: int = @saturate>(wide, wide_scale, zero_point)
    }}""",
    "DequantizeLinear": f"""<{_LINEAR}>(x, scale, zero_point) => (y) {{
        wide_scale = Cast<to = 1>(scale)
        wide = DequantizeLinear<axis: int = @axis, block_size: int = @block_size>(x, wide_scale, zero_point)
        y = CastLike(wide, scale)
    }}""",
    "TRT_FP4DynamicQuantize": f"""<axis: int = -1, block_size: int = 16, scale_type: int = 17,
            output_dtype: int = 23>(x, scale) => (y, scales) {{
        {_BLOCKS} {_AMAX}
        s2_given = Cast<to = 1>(scale)
        {_NVFP4}
        flat = Reshape(fp4, shape)
        y = Cast<to: int = @output_dtype>(flat)
        flat_steps = Reshape(steps, block_shape)
        scales = Cast<to = 17>(flat_steps)
    }}""",
    "TRT_FP4QDQ": f"""<block_size: int = 16>(x) => (y) {{
        {_BLOCKS} {_AMAX}
        largest = ReduceMax<keepdims = 0>(amax)
        range = Constant<value_float = 2688.0>()
        s2_given = Div(largest, range)
        {_NVFP4}
        narrow = Mul(fp4, scaled_steps)
        flat = Reshape(narrow, shape)
        y = CastLike(flat, x)
    }}""",
    "TRT_MXFP8DynamicQuantize": f"""<axis: int = -1, block_size: int = 32,
            output_dtype: int = 17>(x) => (y, scales) {{
        {_BLOCKS} {_AMAX} {_E8M0}
        divisor = Gather(powers, index)
        quotient = Div(blocks, divisor)
        minus_bound = Neg(bound)
        clipped = Clip(quotient, minus_bound, bound)
        flat = Reshape(clipped, shape)
        y = Cast<to = 17>(flat)
        flat_index = Reshape(index, block_shape)
        scales = Cast<to = 2>(flat_index)
    }}""",
    "TRT_MXFP8DequantizeLinear": f"""<axis: int = -1, block_size: int = 32,
            output_dtype: int = 1>(x, scale) => (y) {{
        {_BLOCKS}
        index = Cast<to = 7>(scale)
        factors = Gather(powers, index)
        factor = Unsqueeze(factors, last_axis)
        product = Mul(blocks, factor)
        flat = Reshape(product, shape)
        y = Cast<to: int = @output_dtype>(flat)
    }}""",
}
"""By operator: attributes with their defaults, inputs, outputs and nodes."""


def function(op: str, opset: int, given: Collection[str], inputs: int) -> FunctionProto:
    """The function that computes operator `op` of TensorRT's domain with ONNX operators of version `opset`.

    `given` are the attributes that nodes have and `inputs` is how many inputs. Other attributes become numbers in the
    body and other inputs go: onnx.reference knows no defaults of a function's attributes and no optional inputs.
    """
    text = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {op} {BODIES[op]}'
    made: FunctionProto = onnx.parser.parse_function(text)
    defaults = {item.name: item.i for item in made.attribute_proto}
    for attribute in (attribute for node in made.node for attribute in node.attribute):
        if attribute.ref_attr_name and attribute.ref_attr_name not in given:
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, defaults[attribute.ref_attr_name]))
    kept = [item for item in made.attribute_proto if item.name in given]
    del made.attribute_proto[:]
    made.attribute_proto.extend(kept)
    dropped = set(made.input[inputs:])
    del made.input[inputs:]
    for node in made.node:
        if dropped & set(node.input):  # trailing ones of QuantizeLinear and DequantizeLinear
            del node.input[-1]
    if any("powers" in node.input for node in made.node):
        made.node.insert(0, _powers())
    for index, node in enumerate(made.node):
        node.name = f"{node.op_type}_{index}"
    return made


def _powers() -> onnx.NodeProto:
    """2^(i - 127) for i in 0 to 254 and NaN at 255: what an E8M0 number stands for."""
    powers = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)
    tensor = onnx.numpy_helper.from_array(powers, "powers")
    return onnx.helper.make_node("Constant", [], ["powers"], value=tensor)
