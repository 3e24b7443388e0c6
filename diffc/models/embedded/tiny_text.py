"""Tokenizers and text encoders of the embedded models: character level, two layers, any English prompt."""

from __future__ import annotations

import string
from typing import Any

import diffc.models.embedded.tiny_weights as tiny_weights

CLIP_LENGTH = 77
T5_LENGTH = 128
CLIP_WIDTH = 64
T5_WIDTH = 128


def clip_tokenizer() -> Any:
    """A CLIPTokenizer of the 256 byte characters, each inside and at the end of a word; 77 tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> Any:
    """A T5Tokenizer of the printable ASCII characters; others become <unk>; 128 tokens."""
    from transformers import T5Tokenizer

    letters = string.ascii_letters + string.digits + string.punctuation
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocab = [*special, ("▁", -2.0), *((c, -3.0) for c in letters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def clip_encoder(seed: str, *, projection: bool) -> Any:
    """A CLIPTextModel (or CLIPTextModelWithProjection) of width 64, float32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocab_size = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    tiny_weights.seed_weights(model, seed)
    return model.eval()


def t5_encoder(seed: str) -> Any:
    """A T5EncoderModel of width 128, float32."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=64,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config)
    tiny_weights.seed_weights(model, seed)
    for block in model.encoder.block:  # T5 attention has no 1/sqrt(head size): its query weights carry it
        block.layer[0].SelfAttention.q.weight.data.mul_(config.d_kv**-0.5)
    return model.eval()
