"""What cannot be read off a backbone: which of its layers stay unquantized, and how its pipeline is calibrated.

By class of diffusers. The layers are those of ModelOpt's own filters for these models, with blocks counted from both
ends instead of numbered for one depth. A class that is not here gets what all of them share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffc.models.spec import Config

# ModelOpt's default filter, and every layer outside of numbered blocks: what leads into a network and out of it.
_DEFAULT = (
    r"(?!.*\.\d+\.)"
    r"|.*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding|pos_embed|time_text_embed"
    r"|context_embedder|norm_out|x_embedder|time_embed|caption_projection|adaln_single|proj_in$|condition_embedder"
    r"|patch_embed|distilled_guidance_layer)"
)


@dataclass(frozen=True)
class Hints:
    """`name`: what the family is called. `unquantized`: a regular expression beside those of all classes. `ends`: how
    many blocks of `blocks` stay unquantized at the beginning and at the end, of a network of at least four times as
    many. `calibration`: arguments of the pipeline's call. `cache_plans`: presets that suit it. `refused`: the measured
    reason why the class cannot be compiled; empty where it can.
    """

    name: str
    unquantized: str = ""
    ends: int = 0
    blocks: str = "blocks"
    count: str = "num_layers"
    calibration: Mapping[str, Any] = field(default_factory=dict)
    cache_plans: tuple[str, ...] = ()
    refused: str = ""

    def kept(self, config: Config) -> str:
        """The regular expression of what stays unquantized in a backbone with this config.json."""
        total = int(config.get(self.count) or 0)
        ends = min(self.ends, total // 4)
        numbers = [*range(ends), *range(total - ends, total)]
        own = rf"|.*\b{self.blocks}\.({'|'.join(map(str, numbers))})\." if numbers else ""
        more = f"|{self.unquantized}" if self.unquantized else ""
        return f"({_DEFAULT}{more}{own})"


HINTS: Mapping[str, Hints] = {
    "UNet2DConditionModel": Hints("sd", calibration={"guidance_scale": 7.5}),
    "PixArtTransformer2DModel": Hints("pixart"),
    "SanaTransformer2DModel": Hints("sana"),
    "AuraFlowTransformer2DModel": Hints("auraflow"),
    "LTXVideoTransformer3DModel": Hints("ltx", ends=3, blocks="transformer_blocks", cache_plans=("blocks",)),
    "LTX2VideoTransformer3DModel": Hints("ltx2", ends=3, blocks="transformer_blocks"),
    "WanTransformer3DModel": Hints("wan", ends=3, cache_plans=("blocks",)),
    "CogVideoXTransformer3DModel": Hints("cogvideox"),
    "CogView4Transformer2DModel": Hints("cogview4"),
    "Flux2Transformer2DModel": Hints(
        "flux2", r".*(time_guidance_embed|stream_modulation)", calibration={"guidance_scale": 4.0}
    ),
    "HunyuanVideoTransformer3DModel": Hints("hunyuanvideo"),
    "ChromaTransformer2DModel": Hints("chroma"),
    "QwenImageTransformer2DModel": Hints("qwenimage", ends=2, blocks="transformer_blocks"),
    "Lumina2Transformer2DModel": Hints("lumina2"),
    "ZImageTransformer2DModel": Hints("z-image"),
    "MochiTransformer3DModel": Hints("mochi"),
    "HiDreamImageTransformer2DModel": Hints(
        "hidream", refused="its forward() calls numpy on what its router finds, which a trace cannot follow"
    ),
}


def hints_of(backbone_class: str) -> Hints:
    """The hints for a class of diffusers; a class without has a name made of its own, and the defaults of all."""
    if backbone_class in HINTS:
        return HINTS[backbone_class]
    plain = re.sub(r"(Image|Video)?(Transformer|UNet)?([23]D)?(Condition)?(DiT)?Model$", "", backbone_class)
    return Hints((plain or backbone_class).lower())
