"""Why weights do not fit their config.json: what kind of file they are, told from the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffc.errors import DiffcError

_UNQUANTIZED = "give the model in the type that it was trained in (bfloat16, float16 or float32)"
_FROM_MODELOPT = (
    f"{_UNQUANTIZED} and --format; --from-checkpoint FILE.pt uses a calibration of ModelOpt's mto.save again"
)
_SINGLE_FILE = (
    "convert it with diffusers: from_single_file(FILE) of the backbone's class, then save_pretrained(FOLDER)"
)


@dataclass(frozen=True)
class _Kind:
    """Weights that diffc does not read: a `pattern` that only their names match, what they are, and the way out."""

    pattern: str
    what: str
    fix: str


_KINDS = (
    _Kind(
        r"\.base_layer\.|\.lora_[AB]\.|\.lora_(down|up)\.|\.lora\.",
        "have layers of a LoRA (PEFT) in them, and do not tell whether the LoRA is merged",
        "before save_pretrained call fuse_lora() and then unload_lora_weights() of the pipeline",
    ),
    _Kind(
        r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format)$|\.quant_state\.",
        "are quantized by bitsandbytes",
        _UNQUANTIZED,
    ),
    _Kind(
        r"\.(input_scale|weight_scale|weight_scale_2|input_quantizer\..*|weight_quantizer\..*|_amax)$",
        "are quantized by ModelOpt or a tool that writes the same scales",
        _FROM_MODELOPT,
    ),
    _Kind(r"\.(qweight|qzeros|g_idx|wscales|smooth_factor)$", "are quantized to integers", _UNQUANTIZED),
    _Kind(r"\.(_data|_scale|_shift)$|:_", "are quantized by optimum-quanto or torchao", _UNQUANTIZED),
    _Kind(
        r"\.to_(added_)?(qkv|kv)\.",
        "have fused projections (q, k and v in one), which diffusers reads only after the same fusion",
        "call unfuse_qkv_projections() of the backbone before save_pretrained",
    ),
    _Kind(
        r"^(model\.diffusion_model\.|(double|single|joint|input|middle|output)_blocks?\.\d|x_embedder\.proj\.)",
        "have the names of the original release, not those of diffusers",
        _SINGLE_FILE,
    ),
)
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "model.": "a module that holds the backbone",
}


def quantized_config(config: Mapping[str, Any], where: object) -> DiffcError | None:
    """The error for a config.json that says its weights are quantized; None for one that does not."""
    said = config.get("quantization_config")
    if not said:
        return None
    method = said.get("quant_method", "a library that it does not name") if isinstance(said, dict) else said
    kind = (
        "" if not isinstance(said, dict) else said.get("quant_type") or said.get("bnb_4bit_quant_type") or ""
    )
    fix = _FROM_MODELOPT if "modelopt" in str(method) else f"{_UNQUANTIZED}, and the format with --format"
    return DiffcError(
        f"{where} has a quantization_config: the weights are quantized by {method}{f' ({kind})' if kind else ''}",
        fix=fix,
    )


def misfit(name: str, lacking: Collection[str], strange: Collection[str]) -> DiffcError:
    """The error for weights of the model `name` that lack tensors, or have strange ones; one of both is not empty."""
    for kind in _KINDS:
        found = next((key for key in sorted(strange) if re.search(kind.pattern, key)), None)
        if found:
            return DiffcError(f"the weights of {name} {kind.what}: they have {found!r}", fix=kind.fix)
    for prefix, wrapper in _WRAPPERS.items():
        if any(prefix + key in strange for key in lacking):
            return DiffcError(
                f"the names in the weights of {name} begin with {prefix!r}, as {wrapper} gives them",
                fix=f"save the module inside, or take {prefix!r} from the names of the safetensors file",
            )
    what = (
        f"have no tensor {min(lacking)!r}, which config.json asks for"
        if lacking
        else f"have a tensor {min(strange)!r}, which config.json does not ask for"
    )
    return DiffcError(
        f"the weights of {name} {what}",
        fix="check that config.json and the safetensors files belong together",
    )
