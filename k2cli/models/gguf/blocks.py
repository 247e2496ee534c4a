"""Conversion of llama.cpp's quantized blocks to the layout of MLX.

Q4_0, Q4_1 and Q8_0 are affine in groups of 32 (weight = scale * q + bias), as is MLX's affine
mode, so they are repacked bit for bit and nothing is rounded. The other types have no equivalent
in MLX and are expanded to float16.

Shapes: ``raw`` is ``uint8 [rows, blocks per row * bytes per block]``; expanded weights are
``[rows, columns]``; packed ones ``uint32 [rows, columns * bits / 32]`` with scales and biases
``float16 [rows, columns / 32]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from k2cli.models.gguf.reader import TENSOR_TYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

GROUP_SIZE = 32
PACKED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Types that stay packed, and MLX's bits per weight for them."""

PLAIN_TYPES = ("F32", "F16", "BF16")
"""Types that are copied as they are."""


def repack(type_name: str, raw: Array) -> tuple[Array, Array, Array]:
    """Repack blocks of a type in ``PACKED_BITS`` as MLX's weight, scales and biases.

    Raises:
        OverflowError: if a bias or scale does not fit float16, which happens only in damaged files.
    """
    import numpy as np

    blocks = _blocks(type_name, raw)
    scales = _half(blocks, 0)
    _check_finite(scales)
    if type_name == "Q8_0":
        # int8 q becomes uint8 q + 128, which flips the sign bit; MLX then packs bytes in order.
        codes = (blocks[..., 2:] ^ 0x80).reshape(raw.shape[0], -1)
        return np.ascontiguousarray(codes).view("<u4"), scales, _shifted(scales, 128)
    biases = _half(blocks, 2) if type_name == "Q4_1" else _shifted(scales, 8)
    _check_finite(biases)
    nibbles = blocks[..., 4:] if type_name == "Q4_1" else blocks[..., 2:]
    # A block's 16 bytes hold elements 0-15 in the low and 16-31 in the high halves; MLX wants
    # neighbours in one byte, the first in the low half.
    codes = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(packed.reshape(raw.shape[0], -1)).view("<u4"), scales, biases


def expand(type_name: str, raw: Array) -> Array:
    """Expand blocks of a type in ``EXPANDED_TYPES`` to float16 weights.

    Raises:
        OverflowError: if a weight does not fit float16.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked
        weights = _EXPANDERS[type_name](_blocks(type_name, raw)).reshape(raw.shape[0], -1)
        halves = weights.astype(np.float16)
    _check_finite(halves)
    return halves


def _blocks(type_name: str, raw: Array) -> Array:
    block_bytes = next(size for name, _, size in TENSOR_TYPES.values() if name == type_name)
    return raw.reshape(raw.shape[0], -1, block_bytes)


def _half(blocks: Array, at: int) -> Array:
    """Read the float16 at byte ``at`` of each block: ``[rows, blocks per row]``."""
    import numpy as np

    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]


def _shifted(scales: Array, zero: int) -> Array:
    """Return ``-zero * scales``, which is exact in float16 because zero is a power of two."""
    import numpy as np

    with np.errstate(over="ignore"):
        biases = (scales * np.float16(-zero)).astype(np.float16)
    _check_finite(biases)
    return biases


def _check_finite(values: Array) -> None:
    import numpy as np

    if not np.isfinite(values).all():
        raise OverflowError("a value is not finite in float16")


def _float(blocks: Array, at: int) -> Array:
    import numpy as np

    values: Array = _half(blocks, at).astype(np.float32)[..., None]
    return values


def _fifth_bits(blocks: Array, at: int) -> Array:
    """Return bit 4 of the 32 elements of a Q5 block, as 0 or 16; its 4 bytes start at ``at``."""
    import numpy as np

    bits = np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little")
    return (bits << 4).astype(np.uint8)


def _halves(nibbles: Array) -> Array:
    import numpy as np

    return np.concatenate((nibbles & 15, nibbles >> 4), axis=-1)


def _expand_q5_0(blocks: Array) -> Array:
    import numpy as np

    codes = (_halves(blocks[..., 6:]) | _fifth_bits(blocks, 2)).astype(np.float32)
    return _float(blocks, 0) * (codes - 16)


def _expand_q5_1(blocks: Array) -> Array:
    import numpy as np

    codes = (_halves(blocks[..., 8:]) | _fifth_bits(blocks, 4)).astype(np.float32)
    return _float(blocks, 0) * codes + _float(blocks, 2)


def _k_scales(packed: Array) -> tuple[Array, Array]:
    """Unpack the eight 6-bit scales and minima in 12 bytes of a Q4_K or Q5_K block."""
    import numpy as np

    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate((low & 63, (high & 15) | ((low >> 6) << 4)), axis=-1)
    minima = np.concatenate((middle & 63, (high >> 4) | ((middle >> 6) << 4)), axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _expand_k_affine(blocks: Array, codes: Array) -> Array:
    """Compute scale * code - minimum for ``codes [rows, blocks, 8, 32]`` of Q4_K and Q5_K."""
    scales, minima = _k_scales(blocks[..., 4:16])
    scale = (_float(blocks, 0) * scales)[..., None]
    minimum = (_float(blocks, 2) * minima)[..., None]
    expanded: Array = scale * codes - minimum
    return expanded


def _nibble_rows(quants: Array) -> Array:
    """Unpack 128 bytes to eight rows of 32 codes: each 32 bytes give a low and a high row."""
    import numpy as np

    quarters = quants.reshape(*quants.shape[:-1], 4, 32)
    pairs = np.stack((quarters & 15, quarters >> 4), axis=-2)
    return pairs.reshape(*quants.shape[:-1], 8, 32)


def _expand_q4_k(blocks: Array) -> Array:
    import numpy as np

    return _expand_k_affine(blocks, _nibble_rows(blocks[..., 16:]).astype(np.float32))


def _expand_q5_k(blocks: Array) -> Array:
    import numpy as np

    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = ((blocks[..., 16:48][..., None, :] >> shifts) & 1) << 4
    codes = _nibble_rows(blocks[..., 48:]) | fifth
    return _expand_k_affine(blocks, codes.astype(np.float32))


def _expand_q6_k(blocks: Array) -> Array:
    import numpy as np

    lead = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*lead, 2, 2, 32)
    low = np.stack((low & 15, low >> 4), axis=-3).reshape(*lead, 2, 4, 32)
    shifts = (np.arange(4, dtype=np.uint8) * 2)[:, None]
    high = (blocks[..., 128:192].reshape(*lead, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).astype(np.float32) - 32
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    scales = scales * _float(blocks, 208)
    expanded: Array = codes.reshape(*lead, 16, 16) * scales[..., None]
    return expanded


_EXPANDERS: dict[str, Callable[[Array], Array]] = {
    "Q5_0": _expand_q5_0,
    "Q5_1": _expand_q5_1,
    "Q4_K": _expand_q4_k,
    "Q5_K": _expand_q5_k,
    "Q6_K": _expand_q6_k,
}
EXPANDED_TYPES = tuple(_EXPANDERS)
"""Types that are expanded to float16, and their functions."""
