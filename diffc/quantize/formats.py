"""The quantization formats: one declaration each, over the presets that ModelOpt ships.

Nothing here imports torch or modelopt before a preset is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffc.errors import unknown

PRESETS = "configs/ptq/presets/diffusers/"


@dataclass(frozen=True)
class Format:
    """A format as data: where its ModelOpt preset lies, what it needs, and its widths for tables.

    `preset` is a path below ModelOpt's `modelopt_recipes`, None for a format that quantizes nothing. `min_sm`
    is the lowest compute capability, major * 10 + minor. `weight_bits` and `input_bits` are those of a
    quantized layer, None where they stay in the model's own type.
    """

    name: str
    summary: str
    preset: str | None
    min_sm: int
    weight_bits: int | None
    input_bits: int | None

    @property
    def weight_bytes(self) -> float | None:
        """Bytes of one element of a quantized weight; None where it stays in the model's own type."""
        return None if self.weight_bits is None else self.weight_bits / 8

    def config(self) -> dict[str, Any]:
        """ModelOpt's quantization config: `quant_cfg` (ordered list) and `algorithm`. A fresh dict."""
        if self.preset is None:
            return {"quant_cfg": [], "algorithm": None}
        from modelopt.torch.opt.config_loader import load_config
        from modelopt.torch.quantization.config import QuantizeConfig

        loaded = load_config(self.preset, schema_type=QuantizeConfig)
        return dict(loaded.model_dump(exclude_unset=True))


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("none", "weights and activations in the model's own type", None, 75, None, None),
        Format("int8", "8-bit integers: weights per channel, inputs per tensor", f"{PRESETS}int8", 75, 8, 8),
        Format("fp8", "8-bit floats (E4M3), weights and inputs per tensor", f"{PRESETS}fp8", 89, 8, 8),
    )
}


def find_format(name: str) -> Format:
    """The format of that name. Raises DiffcError that lists the known ones."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS, mend="choose one of these with --format")
    return FORMATS[name]
