"""Quantized KV caches: of one sequence, and of several that decode together.

They replace mlx-lm's ``KVCache`` and ``BatchKVCache`` and have their methods. Keys and values are
kept in groups of 64 or 32 numbers of a head, each group with a scale and a bias, as mlx-lm's own
``QuantizedKVCache`` keeps them, which cannot be merged into batches.

A step of up to ``QUANTIZED_QUERIES`` tokens per sequence multiplies with the quantized arrays. For
a chunk of a prompt the keys and values of one layer are dequantized, and attention is that of an
ordinary cache: the fused kernel where there is one. mlx-lm's attention asks with ``hasattr(cache,
"bits")`` which of the two it has got, so ``bits`` is there only after a short step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from k2cli.errors import UsageError
from k2cli.mlx_lm_package import mlx_lm_module

GROUP_SIZES = (64, 32)
"""Numbers that share a scale and a bias, the preferred first: those that MLX has kernels for."""

QUANTIZED_QUERIES = 8
"""The most new tokens of a sequence that multiply with quantized keys and values.

On a CPU dequantizing takes 2.5 to 5 times as long for one token, see
docs/measurements/quantized-kv.md; 8 tokens are those of a step that verifies a draft of 7. Where
dequantizing begins to pay was not measured.
"""

Parts = tuple[mx.array, mx.array, mx.array]
"""Packed numbers, scales and biases, each ``[rows, heads, tokens, ...]``."""


def group_size_of(widths: Sequence[int]) -> int:
    """Return the size of groups for heads of these widths.

    Raises:
        UsageError: if a width is not a multiple of the smallest group.
    """
    for size in GROUP_SIZES:
        if all(width and width % size == 0 for width in widths):
            return size
    uneven = next(width for width in widths if not width or width % GROUP_SIZES[-1])
    raise UsageError(
        f"a quantized KV cache needs heads whose size is a multiple of {GROUP_SIZES[-1]}; those of "
        f"this model have {uneven}",
        "leave out --kv-bits",
    )


def quantized_bytes(widths: Sequence[int], bits: int, itemsize: int) -> int:
    """Return the bytes of one token of one head: packed numbers, and a scale and bias per group."""
    group = group_size_of(widths)
    return sum(width * bits // 8 + width // group * 2 * itemsize for width in widths)


@dataclass(frozen=True, slots=True)
class HeadForm:
    """The form of keys and values as a model computes them: heads, widths and element type."""

    heads: int
    widths: tuple[int, int]
    dtype: mx.Dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadForm:
        """Return the same value: caches are copied, and an element type of MLX cannot be."""
        return self

    def zeros(self, tokens: int) -> tuple[mx.array, mx.array]:
        """Make keys and values ``[1, heads, tokens, width]``, lazily."""
        key, value = (
            mx.zeros((1, self.heads, tokens, width), dtype=self.dtype) for width in self.widths
        )
        return key, value


class _QuantizedStore:
    """Quantized keys and values of one or several rows; ``used`` tokens of the room are filled."""

    step = 256

    def __init__(self, bits: int) -> None:
        self.stored_bits = bits
        self.keys: Parts | None = None
        self.values: Parts | None = None
        self.used = 0
        self.group_size = 0
        self.form: HeadForm | None = None
        self._dequantizes = False

    @property
    def bits(self) -> int:
        """Bits of a number, if the last step got quantized keys and values; absent otherwise."""
        if self._dequantizes:
            raise AttributeError("the last step got dequantized keys and values")
        return self.stored_bits

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that hold keys and values; none if the cache is empty."""
        return [*(self.keys or ()), *(self.values or ())]

    @property
    def room(self) -> int:
        """Tokens that the arrays have room for."""
        return 0 if self.keys is None else self.keys[0].shape[2]

    def change(self, into: Callable[[mx.array], mx.array]) -> None:
        """Replace each array by what a function makes of it."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = _each(into, self.keys), _each(into, self.values)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append keys and values ``[rows, heads, tokens, width]``; return those of all tokens."""
        count = keys.shape[2]
        if self.form is None:
            self.form = HeadForm(keys.shape[1], (keys.shape[3], values.shape[3]), keys.dtype)
            self.group_size = group_size_of(self.form.widths)
        new_keys, new_values = self._quantized(keys), self._quantized(values)
        if self.used + count > self.room:
            more = -(-count // self.step) * self.step
            if self.keys is None or self.values is None:
                self.keys = _each(lambda part: _zeros_like(part, more), new_keys)
                self.values = _each(lambda part: _zeros_like(part, more), new_values)
            else:
                used = self.used
                self.change(lambda part: extended(part, used, more))
        assert self.keys is not None
        assert self.values is not None
        for held, new in zip((*self.keys, *self.values), (*new_keys, *new_values), strict=True):
            held[..., self.used : self.used + count, :] = new
        self.used += count
        self._dequantizes = count > QUANTIZED_QUERIES
        return self.keys_and_values()

    def _quantized(self, numbers: mx.array) -> Parts:
        packed, scales, biases = mx.quantize(
            numbers, group_size=self.group_size, bits=self.stored_bits
        )
        return packed, scales, biases

    def keys_and_values(self) -> Any:
        """Return keys and values of all tokens, in the form that the last step got."""
        assert self.keys is not None
        assert self.values is not None
        used = self.used
        if self._dequantizes:
            # Sliced after it: MLX would copy slices of the quantized arrays.
            keys, values = self._dequantized(self.keys), self._dequantized(self.values)
            return keys[..., :used, :], values[..., :used, :]
        if self.room == used:
            return self.keys, self.values
        return tuple(
            _each(lambda part: part[..., :used, :], parts) for parts in (self.keys, self.values)
        )

    def _dequantized(self, parts: Parts) -> mx.array:
        return mx.dequantize(*parts, group_size=self.group_size, bits=self.stored_bits)

    def size(self) -> int:
        """Return the tokens that the cache holds, padding included."""
        return self.used

    def empty(self) -> bool:
        """Return True if the cache holds nothing yet."""
        return self.keys is None

    def is_trimmable(self) -> bool:
        """Return True: the last tokens can be removed."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in self.arrays)

    def _like(self, other: _QuantizedStore) -> None:
        """Take over the form of another cache."""
        self.form, self.group_size = other.form, other.group_size


class QuantizedCache(_QuantizedStore):
    """The quantized keys and values of one sequence in one layer."""

    @property
    def offset(self) -> int:
        """Position of the next token."""
        return self.used

    @property
    def state(self) -> tuple[Parts | None, Parts | None]:
        """The arrays, to be evaluated."""
        return self.keys, self.values

    def trim(self, tokens: int) -> int:
        """Remove the last tokens; return how many there were to remove."""
        tokens = min(self.used, tokens)
        self.used -= tokens
        return tokens

    def make_mask(self, *arguments: Any, **named: Any) -> Any:
        """Make the mask of a step, as mlx-lm's caches do."""
        make = mlx_lm_module("models.cache").create_attention_mask
        return make(*arguments, offset=self.used, **named)

    def fill(self, arrays: Sequence[mx.array], tokens: int) -> None:
        """Give an empty cache the arrays of another, in which the first ``tokens`` are valid."""
        keys, values = (arrays[0], arrays[1], arrays[2]), (arrays[3], arrays[4], arrays[5])
        per_word = 32 // self.stored_bits
        key_width, value_width = (parts[0].shape[3] * per_word for parts in (keys, values))
        self.form = HeadForm(keys[0].shape[1], (key_width, value_width), keys[1].dtype)
        self.group_size = key_width // keys[1].shape[3]
        self.keys, self.values, self.used = keys, values, tokens

    @classmethod
    def merge(cls, caches: Sequence[QuantizedCache]) -> QuantizedBatchCache:
        """Merge caches of single sequences into one, padded on the left to the longest."""
        longest = max(cache.used for cache in caches)
        merged = QuantizedBatchCache(
            caches[0].stored_bits, [longest - cache.used for cache in caches]
        )
        if not longest:
            merged.left_padding, merged.used = mx.zeros((len(caches),), dtype=mx.int32), 0
            return merged
        merged._like(next(cache for cache in caches if cache.form is not None))
        merged.used = longest
        merged.keys = _stacked([(cache.keys, cache.used) for cache in caches], longest)
        merged.values = _stacked([(cache.values, cache.used) for cache in caches], longest)
        return merged


class QuantizedBatchCache(_QuantizedStore):
    """The quantized keys and values of several sequences in one layer, padded on the left.

    ``left_padding`` is int32 ``[rows]``.
    """

    def __init__(self, bits: int, left_padding: Sequence[int]) -> None:
        super().__init__(bits)
        self.left_padding = mx.array(list(left_padding), dtype=mx.int32)

    @property
    def offset(self) -> mx.array:
        """Position of the next token of each row."""
        return self.used - self.left_padding

    @property
    def state(self) -> tuple[Parts | None, Parts | None, mx.array]:
        """The arrays, to be evaluated."""
        return self.keys, self.values, self.left_padding

    def prepare(self, *, left_padding: Sequence[int]) -> None:
        """Set the padding of prompts that are computed together, before their first token."""
        if self.keys is not None:
            raise ValueError("padding is added to an empty cache only")
        self.left_padding = self.left_padding + mx.array(list(left_padding), dtype=mx.int32)

    def trim(self, tokens: int) -> int:
        """Remove the last tokens of every row; return how many there were to remove."""
        tokens = min(self.used, tokens)
        self.used -= tokens
        return tokens

    def make_mask(self, count: int, return_array: bool = False, **named: Any) -> mx.array:
        """Make the mask of a step, as mlx-lm's caches do."""
        mask: mx.array = mlx_lm_module("models.base").create_causal_mask(
            count, offset=self.used, left_padding=self.left_padding, **named
        )
        return mask

    def filter(self, rows: Sequence[int]) -> None:
        """Keep only these rows, and as little padding as they need."""
        kept = mx.array(list(rows))
        self.left_padding = self.left_padding[kept]
        unused = min(_numbers(self.left_padding)) if self.keys is not None else 0
        self.change(lambda part: part[kept][..., unused:, :])
        self.left_padding = self.left_padding - unused
        self.used -= unused

    def extend(self, other: Self) -> None:
        """Add the rows of another batch."""
        longest = max(self.used, other.used)
        if self.form is None and other.form is not None:
            self._like(other)
        padding = [each.left_padding + (longest - each.used) for each in (self, other)]
        rows = [each.left_padding.shape[0] for each in (self, other)]
        if self.keys is not None or other.keys is not None:
            both = (self, other)
            self.keys, self.values = (
                _stacked([(parts, each.used) for parts, each in zip(held, both, strict=True)],
                         longest, rows)
                for held in ((self.keys, other.keys), (self.values, other.values))
            )  # fmt: skip
        self.left_padding = mx.concatenate(padding)
        self.used = longest

    def extract(self, row: int) -> QuantizedCache:
        """Copy one row into a cache of its own, without its padding."""
        single = QuantizedCache(self.stored_bits)
        single._like(self)
        if self.keys is not None and self.values is not None:
            first, past_last = _numbers(self.left_padding)[row], self.used
            single.keys, single.values = (
                _each(
                    lambda part: mx.contiguous(part[row : row + 1, :, first:past_last]), parts
                )
                for parts in (self.keys, self.values)
            )  # fmt: skip
            single.used = past_last - first
        return single


def quantized(entries: Sequence[Any], bits: int) -> list[Any]:
    """Replace fresh plain caches by quantized ones; windows and recurrent states stay."""
    plain = mlx_lm_module("models.cache").KVCache
    return [QuantizedCache(bits) if type(entry) is plain else entry for entry in entries]


def extended(held: mx.array, used: int, more: int) -> mx.array:
    """Return the first ``used`` tokens of an array with room for ``more``."""
    rows, heads, _, width = held.shape
    room = mx.zeros((rows, heads, more, width), held.dtype)
    return mx.concatenate([held[..., :used, :], room], axis=2)


def _numbers(array: mx.array) -> list[int]:
    numbers: Any = array.tolist()
    return [int(number) for number in numbers]


def _each(function: Callable[[mx.array], mx.array], parts: Parts) -> Parts:
    packed, scales, biases = parts
    return function(packed), function(scales), function(biases)


def _zeros_like(part: mx.array, tokens: int) -> mx.array:
    rows, heads, _, width = part.shape
    return mx.zeros((rows, heads, tokens, width), dtype=part.dtype)


def _stacked(
    held: Sequence[tuple[Parts | None, int]], longest: int, rows: Sequence[int] | None = None
) -> Parts:
    """Stack rows of several caches, with their tokens at the end of ``longest``.

    There is room after them up to a whole allocation step, as admission counts.
    """
    sample = next(parts for parts, _ in held if parts is not None)
    counts = rows or [1] * len(held)
    room = -(-longest // _QuantizedStore.step) * _QuantizedStore.step
    stacked = []
    for at, like in enumerate(sample):
        _, heads, _, width = like.shape
        around = [(longest - used, room - longest) for _, used in held]
        each = [
            mx.zeros((count, heads, room, width), dtype=like.dtype)
            if parts is None
            else mx.pad(parts[at][..., :used, :], [(0, 0), (0, 0), padding, (0, 0)])
            for (parts, used), count, padding in zip(held, counts, around, strict=True)
        ]
        stacked.append(mx.concatenate(each, axis=0))
    packed, scales, biases = stacked
    return packed, scales, biases
