"""Hooks that let ModelOpt's fake-quantized torch model compute what a compiled graph computes.

Each function is a context manager, or changes the model once: roundings switched off (`without_rounding`) or added to
every layer (`noisy`), attention with quantized probabilities (`quantized_softmax`), and the values that ONNX gives a
weight that is quantized twice (`quantize_twice_as_graphs_do`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from diffc.progress import Update
from diffc.quantize.attention import attention_as
from diffc.quantize.convert import enabled_quantizers, role_of
from diffc.quantize.kinds import KINDS, kind_of
from diffc.quantize.state import settings_of


@contextmanager
def noisy(model: torch.nn.Module, rounding: float, seed: int) -> Iterator[None]:
    """While this is open, every layer's output and every activation quantizer's input is off by up to `rounding`.

    `rounding` is relative to a value plus the root mean square of its tensor: a sum that cancels is small, and its
    error is that of its terms. Quantizers are disturbed as well because ModelOpt multiplies by bound / amax where ONNX
    divides by the scale. The 16-bit inputs of the graph, which no layer makes, often lie exactly between two steps,
    and the two formulas then choose different ones. The input of a sinusoidal embedding is disturbed because its
    angles reach thousands, where a float32 keeps few digits after the point.
    """
    from diffusers.models.embeddings import Timesteps
    from modelopt.torch.quantization.nn import TensorQuantizer

    generator = torch.Generator().manual_seed(seed)

    def disturb(_: Any, __: Any, out: Any) -> Any:
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return out
        size = out.abs() + out.square().mean().sqrt()
        return out + rounding * size * (torch.rand(out.shape, generator=generator) * 2 - 1)

    def disturb_input(module: Any, inputs: Any) -> Any:
        return disturb(module, inputs, inputs[0]), *inputs[1:]

    layers = (m for m in model.modules() if hasattr(m, "weight") or not list(m.children()))
    handles = [m.register_forward_hook(disturb) for m in layers if not isinstance(m, TensorQuantizer)]
    fed = [q for name, q in enabled_quantizers(model).items() if role_of(name) != "weight_quantizer"]
    fed += [m for m in model.modules() if isinstance(m, Timesteps)]
    handles += [module.register_forward_pre_hook(disturb_input) for module in fed]
    with _removed(handles):
        yield


@contextmanager
def without_rounding(
    model: torch.nn.Module, chosen: Callable[[str], bool] = lambda name: True
) -> Iterator[None]:
    """While this is open, ModelOpt's activation quantizers with `chosen` names saturate and do not round."""
    handles = []
    for name, quantizer in enabled_quantizers(model).items():
        if role_of(name) != "weight_quantizer" and chosen(name):
            handles.append(quantizer.register_forward_hook(_saturate))
    with _removed(handles):
        yield


def _saturate(quantizer: Any, inputs: Any, _: Any) -> torch.Tensor:
    """The output of a quantizer without its rounding. Dynamic blocks are scaled to their largest value: identity."""
    x: torch.Tensor = inputs[0]
    if quantizer.pre_quant_scale is not None:
        x = x * quantizer.pre_quant_scale
    kind = kind_of(settings_of(quantizer.get_modelopt_state()))
    if kind.dynamic:
        return x
    scale = quantizer.amax.float() / kind.bound
    return x.clamp(kind.lowest * scale, kind.bound * scale)


@contextmanager
def counted_calls(model: torch.nn.Module, update: Update) -> Iterator[None]:
    """While this is open, `update` is called with how many of the model's modules have run, and how many there are."""
    seen: set[int] = set()
    modules = list(model.modules())

    def count(module: torch.nn.Module, *_: Any) -> None:
        seen.add(id(module))
        update(len(seen), len(modules))

    with _removed([module.register_forward_hook(count) for module in modules]):
        yield


@contextmanager
def quantized_softmax(scale: float | None, dtype: torch.dtype) -> Iterator[None]:
    """While this is open, ModelOpt's quantized attention rounds its probabilities to E4M3 in steps of `scale`.

    None does not round. ModelOpt exports such quantizers and does not simulate them. Graphs have the factor of the
    scores in the scale of the queries, which is of the compute type `dtype`: 1 / sqrt(32) is no number of 16 bits.
    """
    with attention_as(partial(_attention, softmax_scale=scale, dtype=dtype)):
        yield


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
    softmax_scale: float | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + mask) v with quantized operands; [batch, heads, tokens, d].

    A boolean mask, and the one of `is_causal`, has True where a query sees a key.
    """
    del dropout_p
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    query, key = module.q_bmm_quantizer(query), module.k_bmm_quantizer(key)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2) * _as_stored(factor, module.q_bmm_quantizer, dtype)
    rows = torch.softmax(scores if attn_mask is None else scores + attn_mask, dim=-1)
    if softmax_scale is not None:
        rows = KINDS["fp8"].round_trip(rows, torch.tensor(softmax_scale))
    out = rows.to(value.dtype) @ module.v_bmm_quantizer(value)
    result: torch.Tensor = module.bmm2_output_quantizer(out)
    return result


def _as_stored(factor: float, quantizer: Any, dtype: torch.dtype) -> float:
    """The factor of scores that is left when its product with the queries' scale is rounded to `dtype`."""
    amax = getattr(quantizer, "amax", None)
    if amax is None:
        return factor
    scale = float(amax) / KINDS["fp8"].bound
    return float(torch.tensor(scale * factor, dtype=torch.float64).to(dtype)) / scale


def quantize_twice_as_graphs_do(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give every weight with INT4 and FP8 quantizers in sequence (w4a8) the values that ONNX computes.

    The graph stores INT4 values, dequantizes them in the compute type `dtype` and quantizes that to FP8. INT4 values
    times a scale of 8 bits often lie exactly between two FP8 steps, and ModelOpt multiplies by a reciprocal where ONNX
    divides, so the two break such ties differently. Neither is wrong; the reference takes the side that ONNX takes.
    """
    from modelopt.torch.quantization.nn import SequentialQuantizer

    def dequantized(quantizer: Any, _: Any, out: torch.Tensor) -> torch.Tensor:
        scale: torch.Tensor = quantizer.amax.float() / KINDS["int4"].bound
        blocks = out.float().reshape(scale.shape[0], -1)
        # The rounding recovers ModelOpt's INT4 values, whose dequantization is off in the last bit.
        values = (blocks / scale).round() * scale
        return values.reshape(out.shape).to(dtype).to(out.dtype)

    def to_fp8(quantizer: Any, inputs: Any, _: Any) -> torch.Tensor:
        x: torch.Tensor = inputs[0]
        scale: torch.Tensor = quantizer.amax.float() / KINDS["fp8"].bound
        return KINDS["fp8"].round_trip(x, scale)

    for module in model.modules():
        if isinstance(module, SequentialQuantizer):
            module[0].register_forward_hook(dequantized)
            module[1].register_forward_hook(to_fp8)


@contextmanager
def _removed(handles: Any) -> Iterator[None]:
    """Remove the hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
