"""Small backbones of the models that ModelOpt's diffusion scripts export, and inputs at which they are traced.

Names of inputs and outputs, dynamic axes, batch sizes and the layers that stay unquantized are those of ModelOpt's
examples (examples/diffusers/quantization: export.py, utils.py). Image, text and channel sizes are small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

Axes = Mapping[str, Mapping[int, str]]
Inputs = dict[str, torch.Tensor]

_UNET_KEPT = r".*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding|pos_embed|"
_KEPT = _UNET_KEPT + r"time_text_embed|context_embedder|norm_out|x_embedder).*"
_IMAGE = {0: "batch_size", 1: "num_channels", 2: "height", 3: "width"}
_TEXT = {0: "batch_size", 1: "sequence_length"}
_BATCH = {0: "batch_size"}


@dataclass(frozen=True)
class Backbone:
    """One model of ModelOpt's table: how to build a small one, what to feed it, and the names in the ONNX file.

    `inputs(size)` draws inputs at the traced size (0) or another (1); keys are names of the ONNX inputs. `axes` are the
    dynamic axes by name. `kept` matches the names of quantizers that are switched off. `nested` are inputs that
    forward() takes inside `added_cond_kwargs`. `wide` are inputs that stay float32.
    """

    name: str
    cls: str
    config: Mapping[str, Any]
    inputs: Callable[[int], Inputs]
    output: str
    axes: Axes
    kept: str = _KEPT
    nested: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    tuple_output: bool = True

    def build(self, dtype: torch.dtype) -> Any:
        """The torch model in `dtype` with seeded weights, in evaluation mode.

        It is saved and loaded again: from_pretrained keeps some modules of WAN in float32.
        """
        import diffusers

        cls = getattr(diffusers, self.cls)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = cls(**self.config)
        generator = torch.Generator().manual_seed(6)
        for parameter in model.parameters():
            if parameter.dim() < 2:  # biases and norms are 0 and 1 at first: lost ones would not show
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        with TemporaryDirectory(prefix="diffc-") as folder:
            model.save_pretrained(folder)
            return cls.from_pretrained(folder, torch_dtype=dtype).eval()

    def keywords(self, values: Inputs, dtype: torch.dtype) -> dict[str, Any]:
        """`values` as the keyword arguments of forward(), in the order of its parameters."""
        cast = {n: v if n in self.wide else v.to(dtype) for n, v in values.items()}
        words: dict[str, Any] = {n: v for n, v in cast.items() if n not in self.nested}
        if self.nested:
            words["added_cond_kwargs"] = {n: cast[n] for n in self.nested}
        return words | ({"return_dict": False} if self.tuple_output else {})


def _normal(seed: int, **shapes: tuple[int, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _unet_inputs(size: int) -> Inputs:
    batch, rows, columns, text = ((2, 16, 16, 77), (3, 8, 24, 40))[size]
    made = _normal(size, sample=(batch, 4, rows, columns))
    return made | {
        "timestep": torch.tensor([301.0]),
        **_normal(size + 10, encoder_hidden_states=(batch, text, 64)),
    }


def _sdxl_inputs(size: int) -> Inputs:
    made = _unet_inputs(size)
    batch = len(made["sample"])
    pixels = torch.tensor([1024.0, 768.0, 0.0, 16.0, 1024.0, 1024.0]).repeat(batch, 1)
    return made | _normal(size + 20, text_embeds=(batch, 32)) | {"time_ids": pixels}


def _sd3_inputs(size: int) -> Inputs:
    batch, rows, columns, text = ((2, 16, 16, 77), (3, 8, 24, 40))[size]
    made = _normal(size, hidden_states=(batch, 16, rows, columns), encoder_hidden_states=(batch, text, 64))
    return made | _normal(size + 10, pooled_projections=(batch, 64)) | {"timestep": torch.tensor([301.0])}


def _flux_inputs(size: int) -> Inputs:
    rows = (8, 6)[size]
    index = torch.arange(rows * 8)
    made = _normal(size, hidden_states=(1, rows * 8, 16), encoder_hidden_states=(1, 12, 64))
    return made | {
        **_normal(size + 10, pooled_projections=(1, 32)),
        "timestep": torch.tensor([0.75]),
        "img_ids": torch.stack([torch.zeros(rows * 8), index // 8, index % 8], 1),
        "txt_ids": torch.zeros(12, 3),
        "guidance": torch.tensor([3.5]),
    }


def _ltx_inputs(size: int) -> Inputs:
    batch, tokens = ((2, 48), (3, 32))[size]
    made = _normal(size, hidden_states=(batch, tokens, 16), encoder_hidden_states=(batch, 24, 64))
    index = torch.arange(tokens)
    grid = torch.stack([index // 16, index // 4 % 4, index % 4]).float()
    mask = torch.ones(batch, 24)
    mask[0, 20:] = 0.0
    return made | {
        "timestep": torch.full((batch, 1), 301.0),
        "encoder_attention_mask": mask,
        "video_coords": grid.repeat(batch, 1, 1),
    }


def _wan_inputs(size: int) -> Inputs:
    batch, frames, rows, columns = ((1, 5, 6, 8), (2, 3, 4, 8))[size]
    made = _normal(size, hidden_states=(batch, 16, frames, rows, columns))
    return made | {
        "timestep": torch.full((batch,), 301.0),
        **_normal(size + 10, encoder_hidden_states=(batch, 24, 64)),
    }


_UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 64,
    "attention_head_dim": (2, 2, 4),
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
_SDXL = _UNET | {
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
_SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 24,
}
_FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}
_LTX = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "cross_attention_dim": 64,
    "num_layers": 4,
    "caption_channels": 64,
}
_WAN = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 4,
    "rope_max_seq_len": 64,
}
_UNET_AXES = {
    "sample": _IMAGE,
    "timestep": {0: "steps"},
    "encoder_hidden_states": _TEXT,
    "latent": _IMAGE,
}
_SD3_AXES = {
    "hidden_states": _IMAGE,
    "timestep": {0: "steps"},
    "encoder_hidden_states": _TEXT,
    "pooled_projections": _BATCH,
}
_FLUX_AXES = {
    "hidden_states": {0: "batch_size", 1: "latent_dim"},
    "encoder_hidden_states": _BATCH,
    "pooled_projections": _BATCH,
    "timestep": _BATCH,
    "img_ids": {0: "latent_dim"},
    "guidance": _BATCH,
    "latent": _BATCH,
}
_LTX_AXES = {
    "hidden_states": {0: "batch_size", 1: "latent_dim"},
    "encoder_hidden_states": _BATCH,
    "timestep": _BATCH,
    "encoder_attention_mask": _BATCH,
    "video_coords": {0: "batch_size", 2: "latent_dim"},
}
_WAN_AXES = {
    "hidden_states": {0: "batch_size", 2: "frame_num", 3: "height", 4: "width"},
    "encoder_hidden_states": _BATCH,
    "timestep": _BATCH,
}

BACKBONES: Mapping[str, Backbone] = {
    b.name: b
    for b in (
        Backbone(
            "sdxl",
            "UNet2DConditionModel",
            _SDXL,
            _sdxl_inputs,
            "latent",
            {**_UNET_AXES, "text_embeds": _BATCH, "time_ids": _BATCH},
            nested=("text_embeds", "time_ids"),
        ),
        Backbone("sd15", "UNet2DConditionModel", _UNET, _unet_inputs, "latent", _UNET_AXES),
        Backbone(
            "sd3", "SD3Transformer2DModel", _SD3, _sd3_inputs, "sample", {**_SD3_AXES, "sample": _IMAGE}
        ),
        Backbone(
            "sd35",
            "SD3Transformer2DModel",
            _SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
            _sd3_inputs,
            "out_hidden_states",
            {**_SD3_AXES, "out_hidden_states": _IMAGE},
        ),
        Backbone(
            "flux",
            "FluxTransformer2DModel",
            _FLUX,
            _flux_inputs,
            "latent",
            _FLUX_AXES,
            r"(proj_out.*|.*(time_text_embed|context_embedder|x_embedder|norm_out|time_guidance_embed).*)",
            wide=("img_ids", "txt_ids", "guidance"),
        ),
        Backbone(
            "ltx",
            "LTXVideoTransformer3DModel",
            _LTX,
            _ltx_inputs,
            "latent",
            _LTX_AXES,
            r".*(proj_in|time_embed|caption_projection|proj_out|patchify_proj|adaln_single|"
            r"transformer_blocks\.(0|1|2|45|46|47)\.).*",
            tuple_output=False,
        ),
        Backbone(
            "wan",
            "WanTransformer3DModel",
            _WAN,
            _wan_inputs,
            "latent",
            _WAN_AXES,
            r".*(patch_embedding|condition_embedder|proj_out|blocks\.(0|1|2|37|38|39)\.).*",
            tuple_output=False,
        ),
    )
}
