"""The choice of the next tokens of a step's rows, from logits and the masks of grammars.

A step that verifies a draft has logits after several tokens of one row. Each is chosen from as if
the drafted tokens before it were the answer, with the random key that it has without drafts. So
whatever is accepted is what would have been chosen anyway.

Forbidden tokens get logits of -inf. Bias and penalties leave these as they are, so it does not
matter that they come later, and a whole batch is masked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from k2cli.rank.engine.requests import Running

_WORD_BITS = 32


def forbid(logits: mx.array, masks: Sequence[bytes | None]) -> mx.array:
    """Set the logits of forbidden tokens to -inf, lazily.

    Args:
        logits: float ``[rows, vocabulary]``.
        masks: one per row, in the form of ``grammars.mask_messages.Mask``; None allows all tokens.

    Returns:
        Float ``[rows, vocabulary]``, the same array if no row has a mask.
    """
    if not any(mask is not None for mask in masks):
        return logits
    rows, vocabulary = logits.shape
    size = -(-vocabulary // _WORD_BITS) * _WORD_BITS // 8
    all_allowed = b"\xff" * size
    packed = b"".join(
        all_allowed if mask is None else mask[:size].ljust(size, b"\0") for mask in masks
    )
    # An array takes any buffer, although its type stub does not say so.
    words = mx.array(cast(Any, memoryview(packed).cast("I"))).reshape(rows, -1, 1)
    bits = mx.array([1 << bit for bit in range(_WORD_BITS)], dtype=mx.uint32)
    allowed = ((words & bits) != 0).reshape(rows, -1)[:, :vocabulary]
    return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))


def choose_tokens(rows: Sequence[Running], logits: mx.array) -> tuple[mx.array, mx.array]:
    """Choose the next token of every row, lazily.

    A row whose sampler raises is marked as failed and gets token 0, which is never sent. A row that
    has ended gets any token.

    Args:
        logits: float ``[rows, vocabulary]``.

    Returns:
        The logits without forbidden tokens, and the tokens: uint32 ``[rows]``.
    """
    logits = forbid(logits, [None if row.ended else row.mask for row in rows])
    if all(row.ended or row.sampler.is_plain for row in rows):
        return logits, mx.argmax(logits, axis=-1)
    picks = []
    for index, row in enumerate(rows):
        try:
            picks.append(row.sampler.pick(logits[index]).astype(mx.uint32))
        except Exception as error:  # no error may affect another request
            row.failure = error
            picks.append(mx.array(0, dtype=mx.uint32))
    return logits, mx.stack(picks)


def choose_after_drafts(row: Running, logits: mx.array) -> mx.array:
    """Choose a token after the input of a row and after each of its drafted tokens, lazily.

    Args:
        logits: float ``[1 + drafted, vocabulary]``.

    Returns:
        The tokens: uint32 ``[1 + drafted]``. The sampler has then chosen so many.
    """
    if row.ended or row.sampler.is_plain:
        return mx.argmax(logits, axis=-1)
    try:
        return mx.stack([row.sampler.pick(each).astype(mx.uint32) for each in logits])
    except Exception as error:  # as in choose_tokens
        row.failure = error
        return mx.zeros((len(logits),), dtype=mx.uint32)
