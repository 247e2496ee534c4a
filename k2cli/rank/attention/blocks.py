"""Attention to blocks of a context in turn, with a running maximum and sum of each query.

No array has the size of chunk times context: scores are of one block. Of the blocks before, each
query keeps its largest score, the sum of its weights and its output, in float32 (Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"). ``rank.attention.latent`` makes keys
and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

_DIAGONAL_BLOCKS = 4
"""Parts of a block in which a chunk's own tokens are computed: half of such a part is masked."""
_SUMMED = 128
"""Weights of 16 bits that are summed in one product, which accumulates in float32."""


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens ``[first, past_last)`` of the context, and the queries from ``first_query`` on.

    ``mask`` (bool, ``[..., queries, tokens]``) is None if these queries see all of the tokens.
    """

    first: int
    past_last: int
    first_query: int = 0
    mask: mx.array | None = None


@dataclass(frozen=True, slots=True)
class PartialAttention:
    """Attention to the blocks so far, in float32, per query: ``[batch, heads, queries, ...]``.

    ``total`` is the sum of the weights and ``output`` the weighted sum of the values, both relative
    to the largest score, ``maximum``.
    """

    maximum: mx.array
    total: mx.array
    output: mx.array

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.maximum, self.total, self.output


KeysValues = Callable[[Block], tuple[mx.array, mx.array]]
"""Makes keys ``[batch, heads or 1, width, tokens]`` and values of a block."""


def _pieces(first: int, past_last: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces of a length, 0 for one piece."""
    step = length or max(1, past_last - first)
    for start in range(first, past_last, step):
        yield start, min(start + step, past_last)


def _whole_sums(tokens: int, length: int) -> int:
    """Round down to tokens whose weights are summed without a copy; see ``_row_sums``."""
    step = min(_SUMMED, length or _SUMMED)
    return tokens // step * step


def causal_blocks(held: int, count: int, length: int) -> Iterator[Block]:
    """Cut a context of ``held`` tokens and a chunk of ``count`` new ones; length 0 means whole."""
    unmasked = _whole_sums(held, length)
    for first, past_last in _pieces(0, unmasked, length):
        yield Block(first, past_last)
    part = max(1, length // _DIAGONAL_BLOCKS) if length else 0
    for first, past_last in _pieces(unmasked, held + count, part):
        query = max(0, first - held)
        rows = mx.arange(held + query, held + count)[:, None]
        yield Block(first, past_last, query, rows >= mx.arange(first, past_last)[None])


def masked_blocks(context: int, length: int, mask: mx.array | None) -> Iterator[Block]:
    """Cut a context whose mask is not known to be causal, and the mask with it."""
    whole = _whole_sums(context, length)
    pieces = [*_pieces(0, whole, length), *_pieces(whole, context, length)]
    for first, past_last in pieces:
        yield Block(first, past_last, 0, None if mask is None else mask[..., first:past_last])


class BlockEvaluation:
    """Evaluates attention to a block before another block is built.

    MLX would hold the scores of several blocks at once: it allocates an array when an operation is
    submitted, up to 100 ahead of the one that is computed. A GPU gets one block ahead, so that it
    need not wait for the program.
    """

    def __init__(self, before_wait: Callable[[], None]) -> None:
        self._before_wait = before_wait
        self._ahead: PartialAttention | None = None
        self._on_gpu = mx.default_device() == mx.gpu

    def __call__(self, part: PartialAttention) -> None:
        waited = part
        if self._on_gpu:
            mx.async_eval(*part.arrays)  # type: ignore[no-untyped-call]
            waited, self._ahead = self._ahead or part, part
        self._before_wait()
        mx.eval(*waited.arrays)


def in_blocks(
    queries: mx.array,
    blocks: Iterator[Block],
    keys_values: KeysValues,
    scale: float,
    evaluate: BlockEvaluation | None,
) -> mx.array:
    """Attend to blocks in turn.

    Args:
        queries: ``[batch, heads, queries, width]``.
        evaluate: called between two blocks.

    Returns:
        Float32 ``[batch, heads, queries, width of a value]``; lazy.
    """
    factor = mx.array(scale, dtype=mx.float32)
    so_far: PartialAttention | None = None
    for block in blocks:
        if so_far is not None and evaluate is not None:
            evaluate(so_far)
        keys, values = keys_values(block)
        begin = block.first_query
        scores = _product(queries[..., begin:, :] if begin else queries, keys)
        if block.mask is not None:
            least = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
            scores = mx.where(block.mask, scores, least)
        earlier = _tail(so_far, begin)
        so_far = _joined(so_far, begin, _extended(earlier, scores, values, factor))
        del keys, values, scores, earlier
    assert so_far is not None
    return so_far.output / so_far.total


def _extended(
    earlier: PartialAttention | None, scores: mx.array, values: mx.array, factor: mx.array
) -> PartialAttention:
    """Add a block to attention so far."""
    maximum = mx.max(scores, axis=-1, keepdims=True).astype(mx.float32)
    if earlier is not None:
        maximum = mx.maximum(maximum, earlier.maximum)
    weights = _exponentials(scores, maximum, factor)
    total, output = _row_sums(weights), _product(weights, values)
    if earlier is None:
        return PartialAttention(maximum, total, output.astype(mx.float32))
    correction = mx.exp((earlier.maximum - maximum) * factor)
    return PartialAttention(
        maximum,
        earlier.total * correction + total,
        _rescaled(earlier.output, correction, output),
    )


def _tail(part: PartialAttention | None, begin: int) -> PartialAttention | None:
    """Leave out the queries before ``begin``, which do not see the next block."""
    if part is None or begin == 0:
        return part
    return PartialAttention(*(each[..., begin:, :] for each in part.arrays))


def _joined(part: PartialAttention | None, begin: int, tail: PartialAttention) -> PartialAttention:
    """Put the queries before ``begin`` back, which keep what they had."""
    if part is None or begin == 0:
        return tail
    pairs = zip(part.arrays, tail.arrays, strict=True)
    return PartialAttention(
        *(mx.concatenate([old[..., :begin, :], new], axis=-2) for old, new in pairs)
    )


def _product(left: mx.array, right: mx.array) -> mx.array:
    """Multiply ``[batch, heads, rows, inner]`` by ``[batch, heads or 1, inner, columns]``.

    What all heads share is multiplied by the rows of all of them at once.
    """
    batch, heads, rows, inner = left.shape
    if right.shape[1] == heads:
        return left @ right
    product = left.reshape(batch, 1, heads * rows, inner) @ right
    return product.reshape(batch, heads, rows, right.shape[-1])


@functools.partial(mx.compile, shapeless=True)
def _exponentials(scores: mx.array, maximum: mx.array, factor: mx.array) -> mx.array:
    return mx.exp((scores.astype(mx.float32) - maximum) * factor).astype(scores.dtype)


@functools.partial(mx.compile, shapeless=True)
def _rescaled(output: mx.array, correction: mx.array, added: mx.array) -> mx.array:
    return output * correction + added.astype(mx.float32)


def _row_sums(weights: mx.array) -> mx.array:
    """Sum the last axis in float32 ``[..., 1]``, without a copy of the weights in float32."""
    if weights.dtype == mx.float32:
        return mx.sum(weights, axis=-1, keepdims=True)
    whole = weights.shape[-1] // _SUMMED * _SUMMED
    total = mx.sum(weights[..., whole:].astype(mx.float32), axis=-1, keepdims=True)
    if whole:
        parts = weights[..., :whole].reshape(*weights.shape[:-1], -1, _SUMMED)
        sums = parts @ mx.ones((_SUMMED, 1), weights.dtype)
        total = total + mx.sum(sums.astype(mx.float32), axis=-2)
    return total
