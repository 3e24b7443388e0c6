"""digits-video: handwritten digits that move across the page, painted by LTX-Video's architecture.

Nine frames of 32 x 32 px. The text encoder (T5), the video VAE and the backbone are small but trained
(`tools/train/embedded.py`, docs/digits.md).
"""

from __future__ import annotations

from typing import Any

from diffc.models.embedded.tiny_text import T5_WIDTH, t5_encoder, t5_tokenizer

PIXELS, FRAMES = 32, 9
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("still", "right", "left", "up", "down")
"""What a prompt may ask for: the movement over all frames; "still" where it names none."""
NATIVE = {"height": PIXELS, "width": PIXELS, "frames": FRAMES}
"""The size that the model was trained for, which neither LTX-Video's backbone nor its VAE can tell."""

BACKBONE: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "num_layers": 6,
    "caption_channels": T5_WIDTH,
}
_WIDTH = 24
VAE: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (_WIDTH,) * 3,
    "down_block_types": ("LTXVideoDownBlock3D",) * 3,
    "decoder_block_out_channels": (_WIDTH,) * 3,
    "spatio_temporal_scaling": (True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, False),
    "layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("conv",) * 3,
    "upsample_residual": (False,) * 3,
    "upsample_factor": (1,) * 3,
    "patch_size": 2,
}
"""8 x 8 pixels and 4 frames to a latent, after the first frame, which has latents of its own."""


def prompt(digit: int, direction: int) -> str:
    """The prompt that asks for `digit` (0 to 9) and a movement (its number in DIRECTIONS), as the figures have it."""
    moves = f" moving {DIRECTIONS[direction]}" if direction else ""
    return f"a handwritten {WORDS[digit]}{moves}"


def untrained() -> Any:
    """LTXPipeline in float32, before any weights are loaded, from torch's random state."""
    import diffusers

    return diffusers.LTXPipeline(
        transformer=diffusers.LTXVideoTransformer3DModel(**BACKBONE).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKLLTXVideo(**VAE).eval(),
        text_encoder=t5_encoder("digits/t5_video"),
        tokenizer=t5_tokenizer(),
    )
