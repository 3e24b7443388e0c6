"""The block types of GGUF files: bytes of one block -> its float32 values, as ggml defines them (ggml-common.h).

Every function takes whole blocks, uint8 [blocks, bytes], and gives float32 [blocks, elements].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from passes.weights.recipe import Array


@dataclass(frozen=True)
class Block:
    """A block type: its number in a GGUF file, elements and bytes of a block, and its values."""

    number: int
    elements: int
    nbytes: int
    values: Callable[[Array], Array]


def _float16(x: Array, start: int) -> Array:
    """The float16 at byte `start` of every block, in float32 [blocks, 1]."""
    return np.ascontiguousarray(x[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(body: Array) -> Array:
    """Lower nibbles are the first half of the elements, upper ones the second."""
    return np.concatenate((body & 15, body >> 4), axis=-1)


def _fifth_bits(x: Array, start: int) -> Array:
    """32 bits, one for each element, as 16 or 0."""
    bits = np.unpackbits(np.ascontiguousarray(x[:, start : start + 4]), axis=1, bitorder="little")
    return bits.astype(np.uint8) << 4


def _q4_0(x: Array) -> Array:
    return (_nibbles(x[:, 2:]).astype(np.float32) - 8) * _float16(x, 0)


def _q4_1(x: Array) -> Array:
    return _nibbles(x[:, 4:]).astype(np.float32) * _float16(x, 0) + _float16(x, 2)


def _q5_0(x: Array) -> Array:
    codes = _nibbles(x[:, 6:]) | _fifth_bits(x, 2)
    return (codes.astype(np.float32) - 16) * _float16(x, 0)


def _q5_1(x: Array) -> Array:
    codes = _nibbles(x[:, 8:]) | _fifth_bits(x, 4)
    return codes.astype(np.float32) * _float16(x, 0) + _float16(x, 2)


def _q8_0(x: Array) -> Array:
    return np.ascontiguousarray(x[:, 2:]).view(np.int8).astype(np.float32) * _float16(x, 0)


def _two_bits(body: Array) -> Array:
    """64 bytes -> 256 codes: of each 32 bytes, the lowest two bits of all, then the next two."""
    halves = body.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (halves & 3).reshape(-1, 16, 16)


def _q2_k(x: Array) -> Array:
    scales, codes = x[:, :16], _two_bits(x[:, 16:80]).astype(np.float32)
    step = (_float16(x, 80) * (scales & 15).astype(np.float32))[..., np.newaxis]
    least = (_float16(x, 82) * (scales >> 4).astype(np.float32))[..., np.newaxis]
    values: Array = step * codes - least
    return values.reshape(-1, 256)


def _q3_k(x: Array) -> Array:
    high, body, packed = x[:, :32], x[:, 32:96], x[:, 96:108]
    lower = np.concatenate((packed[:, :8] & 15, packed[:, :8] >> 4), axis=1)
    upper = packed[:, np.newaxis, 8:] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    scales = (lower | (upper & 3).reshape(-1, 16) << 4).astype(np.int8) - 32
    bits = high.reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1) & 1
    codes = _two_bits(body).astype(np.int8) - ((bits ^ 1) << 2).reshape(-1, 16, 16).astype(np.int8)
    step = (_float16(x, 108) * scales.astype(np.float32))[..., np.newaxis]
    values: Array = step * codes.astype(np.float32)
    return values.reshape(-1, 256)


def _six_bit_scales(packed: Array) -> tuple[Array, Array]:
    """12 bytes -> 8 scales and 8 minima of six bits each, float32."""
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((low & 63, high & 15 | low >> 2 & 48), axis=1)
    minima = np.concatenate((mid & 63, high >> 4 | mid >> 2 & 48), axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _scaled_k(x: Array, codes: Array) -> Array:
    """Codes [blocks, 8, 32] of Q4_K and Q5_K as values."""
    scales, minima = _six_bit_scales(x[:, 4:16])
    step = (_float16(x, 0) * scales)[..., np.newaxis]
    least = (_float16(x, 2) * minima)[..., np.newaxis]
    values: Array = step * codes.astype(np.float32) - least
    return values.reshape(-1, 256)


def _q4_k(x: Array) -> Array:
    return _scaled_k(x, _nibbles(x[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(x: Array) -> Array:
    codes = _nibbles(x[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    bits = x[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1) & 1
    return _scaled_k(x, codes | bits << 4)


def _q6_k(x: Array) -> Array:
    low, high = x[:, :128].reshape(-1, 2, 64), x[:, 128:192].reshape(-1, 2, 1, 32)
    lower = np.concatenate((low & 15, low >> 4), axis=-1).reshape(-1, 2, 4, 32)
    upper = high >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3
    codes = (lower | upper << 4).reshape(-1, 16, 16).astype(np.int8) - 32
    scales = np.ascontiguousarray(x[:, 192:208]).view(np.int8).astype(np.float32)
    step = (_float16(x, 208) * scales)[..., np.newaxis]
    values: Array = step * codes.astype(np.float32)
    return values.reshape(-1, 256)


_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # ggml's table of the values that four bits stand for


def _iq4_nl(x: Array) -> Array:
    return _float16(x, 0) * _IQ4[_nibbles(x[:, 2:])]


def _iq4_xs(x: Array) -> Array:
    high = np.ascontiguousarray(x[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack((x[:, 4:8] & 15, x[:, 4:8] >> 4), axis=-1).reshape(-1, 8)
    scales = (low | (high << 4).astype(np.uint8)).astype(np.int8) - 32
    step = (_float16(x, 0) * scales.astype(np.float32))[..., np.newaxis]
    return (step * _IQ4[_nibbles(x[:, 8:].reshape(-1, 8, 16))]).reshape(-1, 256)


BLOCKS: dict[str, Block] = {
    "Q4_0": Block(2, 32, 18, _q4_0),
    "Q4_1": Block(3, 32, 20, _q4_1),
    "Q5_0": Block(6, 32, 22, _q5_0),
    "Q5_1": Block(7, 32, 24, _q5_1),
    "Q8_0": Block(8, 32, 34, _q8_0),
    "Q2_K": Block(10, 256, 84, _q2_k),
    "Q3_K": Block(11, 256, 110, _q3_k),
    "Q4_K": Block(12, 256, 144, _q4_k),
    "Q5_K": Block(13, 256, 176, _q5_k),
    "Q6_K": Block(14, 256, 210, _q6_k),
    "IQ4_NL": Block(20, 32, 18, _iq4_nl),
    "IQ4_XS": Block(23, 256, 136, _iq4_xs),
}
