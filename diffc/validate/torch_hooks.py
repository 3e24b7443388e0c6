"""The reference for attention whose probabilities are quantized, which ModelOpt exports and does not simulate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx
import torch


def softmax_scale(model: onnx.ModelProto) -> float | None:
    """The scale of the quantizers behind Softmax, as the pass quantize-softmax leaves them; None where there are none.

    It is 1 / 448, a probability being at most 1, rounded up to what every compute type holds.
    """
    softmax = {node.output[0] for node in model.graph.node if node.op_type == "Softmax"}
    found = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in softmax}
    values = {float(onnx.numpy_helper.to_array(t)) for t in model.graph.initializer if t.name in found}
    if found and len(values) != 1:
        raise RuntimeError(f"the quantizers of probabilities have the scales {sorted(values)}")
    return next(iter(values), None)


@contextmanager
def quantized_softmax(scale: float) -> Iterator[None]:
    """ModelOpt's quantized attention rounds its probabilities to E4M3 in steps of `scale` while this is open."""
    from modelopt.torch.quantization.plugins.diffusion.diffusers import _QuantAttention

    functions = _QuantAttention._functionals_to_replace
    _QuantAttention._functionals_to_replace = [
        (torch.nn.functional, "scaled_dot_product_attention", partial(_attention, scale_of_shares=scale))
    ]
    try:
        yield
    finally:
        _QuantAttention._functionals_to_replace = functions


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    scale_of_shares: float,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + mask) v with quantized operands; [batch, heads, tokens, d]."""
    del dropout_p
    if is_causal or (attn_mask is not None and attn_mask.dtype == torch.bool):
        raise NotImplementedError("no diffusion backbone here masks its attention by position")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    query, key = module.q_bmm_quantizer(query), module.k_bmm_quantizer(key)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    shares = torch.softmax(scores if attn_mask is None else scores + attn_mask, dim=-1)
    steps = (shares / scale_of_shares).clamp(max=448.0).to(torch.float8_e4m3fn).float()
    out = (steps * scale_of_shares).to(value.dtype) @ module.v_bmm_quantizer(value)
    result: torch.Tensor = module.bmm2_output_quantizer(out)
    return result
