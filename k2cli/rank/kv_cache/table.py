"""KV caches of one rank: those of sequences in prefill, of decode batches and of kept prefixes.

Every entry is a list of mlx-lm cache objects, one per decoder layer that this rank holds. Caches
of single sequences are merged when they join a batch and cut out again when they leave it.
``kept_prefixes`` has those that are kept for later. The leader decides each of these changes; this
module carries them out.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.rank.kv_cache.kept_prefixes import KeptPrefixes, LayerCaches, checksum
from k2cli.rank.kv_cache.segments import can_cut
from k2cli.sharding.kv_cache.quantized import QuantizedBatchCache, QuantizedCache, extended
from k2cli.sharding.stage import Stage

_RELEASE_SECONDS = 0.01
_ROUNDING_BYTES = 2 * 3 * 2**14
"""Memory of keys and values beyond their elements: MLX takes whole pages (16 KiB on a Mac) for an
array, and reuses a freed one that is up to two pages larger (backend/common/buffer_cache.h)."""


class Keep(Protocol):
    """Fields that say how a sequence's cache is kept: ``CloseSequence`` and ``LeaveBatch``."""

    @property
    def keep_as(self) -> int | None: ...

    @property
    def keep_below(self) -> int | None: ...

    @property
    def keep_from(self) -> int: ...


@dataclass(slots=True)
class Batch:
    """Sequences that decode together: the id of each row, and the merged caches."""

    rows: list[int]
    caches: LayerCaches


@dataclass(slots=True)
class CacheTable:
    """All caches of a rank, and their tokens: the state on which ranks must agree."""

    stage: Stage
    sequences: dict[int, LayerCaches] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)
    prefixes: KeptPrefixes = field(init=False)
    _tokens: dict[int, array[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prefixes = KeptPrefixes(can_cut(self.stage), self.stage.make_local_cache)

    def open(
        self, sequence: int, prefix: int | None, kept_tokens: int, release: Collection[int] = ()
    ) -> None:
        """Make a cache for a sequence: empty, or a copy of the first tokens of a kept prefix.

        Nodes of the prefix to ``release`` are dropped.
        """
        if prefix is None:
            self._tokens[sequence] = array("i")
            self.sequences[sequence] = self.stage.make_local_cache()
            return
        self._tokens[sequence], self.sequences[sequence] = self.prefixes.open(
            prefix, kept_tokens, release
        )

    def feed(self, sequence: int, tokens: Sequence[int]) -> None:
        """Record tokens that a sequence's cache holds from now on."""
        self._tokens[sequence].extend(tokens)

    def close(self, sequence: int, keep: Keep) -> None:
        """Release a sequence's cache, or keep it as a prefix."""
        self._settle(sequence, self.sequences.pop(sequence), keep)

    def _settle(self, sequence: int, caches: LayerCaches, keep: Keep) -> None:
        tokens = self._tokens.pop(sequence)
        if keep.keep_as is not None:
            self.prefixes.keep(keep.keep_as, tokens, caches, keep.keep_below, keep.keep_from)

    def join(self, batch: int, sequence: int) -> None:
        """Make a sequence the last row of a batch."""
        caches = self.sequences.pop(sequence)
        if batch not in self.batches:
            self.batches[batch] = Batch([sequence], caches)
            return
        into = self.batches[batch]
        alone = len(into.rows) == 1
        for layer, cache in enumerate(into.caches):
            if alone:
                into.caches[layer] = _merge([cache, caches[layer]])
            else:
                cache.extend(_merge([caches[layer]]))
            caches[layer] = None
            mx.eval(into.caches[layer].state)
        into.rows.append(sequence)

    def open_together(self, lengths: list[int]) -> LayerCaches:
        """Make merged caches for prompts of these lengths, padded on the left to the longest."""
        caches = self._merged(len(lengths))
        longest = max(lengths)
        for cache in caches:
            cache.prepare(left_padding=[longest - length for length in lengths])
        return caches

    def _merged(self, rows: int) -> LayerCaches:
        singles = [self.stage.make_local_cache() for _ in range(rows)]
        return [_merge(list(layer)) for layer in zip(*singles, strict=True)]

    def _empty(self, rows: int) -> LayerCaches:
        """Make empty caches for a batch; a single row gets plain caches."""
        return self.stage.make_local_cache() if rows == 1 else self._merged(rows)

    def join_together(self, batch: int, sequences: list[int], caches: LayerCaches) -> None:
        """Make sequences with merged caches the last rows of a batch."""
        for sequence in sequences:
            self.sequences.pop(sequence)
        if batch not in self.batches:
            self.batches[batch] = Batch(list(sequences), caches)
            return
        into = self.batches[batch]
        if len(into.rows) == 1:
            into.caches = [_merge([cache]) for cache in into.caches]
        for cache, other in zip(into.caches, caches, strict=True):
            cache.extend(other)
        into.rows += sequences

    def cut_back(self, batch: int, tokens: int) -> None:
        """Remove the last tokens of a batch's only row."""
        own = self.batches[batch]
        (sequence,) = own.rows
        for cache in own.caches:
            cache.trim(tokens)
        del self._tokens[sequence][-tokens:]

    def leave(self, batch: int, sequence: int, keep: Keep, move_to: int | None = None) -> None:
        """Take a sequence out of a batch: release its cache, keep it as a prefix, or move it."""
        source = self.batches[batch]
        row = source.rows.index(sequence)
        if len(source.rows) == 1:
            own = source.caches
            del self.batches[batch]
        elif not any(self._tokens[one] for one in source.rows):
            # mlx-lm cannot cut a row out of a batch that holds nothing yet.
            source.rows.remove(sequence)
            own, source.caches = self._empty(1), self._empty(len(source.rows))
        else:
            own = _take_out(source, row, wanted=keep.keep_as is not None or move_to is not None)
        if move_to is not None:
            self.sequences[sequence] = own
            self.join(move_to, sequence)
        else:
            self._settle(sequence, own, keep)

    def batch_bytes(self, batch: int) -> int:
        """Return the bytes of a batch's caches; 0 if there is no such batch yet."""
        entry = self.batches.get(batch)
        return sum(cache.nbytes for cache in entry.caches) if entry else 0

    def digest(self, step: int) -> str:
        """Return the SHA-256 (16 hexadecimal digits) of this rank's records after a step.

        It is equal on every rank: it covers the step, the tokens of every sequence and kept prefix,
        and the rows of every batch; never sizes in bytes, which differ between stages.
        """
        state = (
            step,
            [(sequence, *checksum(self._tokens[sequence])) for sequence in sorted(self._tokens)],
            sorted((batch, tuple(entry.rows)) for batch, entry in self.batches.items()),
            self.prefixes.checksums(),
        )
        return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def _take_out(source: Batch, row: int, *, wanted: bool) -> LayerCaches:
    """Remove a row from a batch of several; return the row's own caches if ``wanted``.

    Each layer is evaluated at once: a lazy slice would keep the whole batch in memory.
    """
    rest = [index for index in range(len(source.rows)) if index != row]
    own: LayerCaches = []
    for layer, cache in enumerate(source.caches):
        if wanted:
            own.append(cache.extract(row))
            mx.eval(own[-1].state)
        if len(rest) == 1:
            # A single sequence needs no padding and no mask: its plain cache is faster.
            source.caches[layer] = cache.extract(rest[0])
        else:
            cache.filter(rest)
        mx.eval(source.caches[layer].state)
    source.rows = [source.rows[index] for index in rest]
    return own


def make_room(caches: LayerCaches, tokens: int) -> None:
    """Enlarge plain caches for ``tokens`` more tokens, one layer at a time.

    mlx-lm's caches grow by copying in the middle of a step. A GPU runs behind the program, and
    would hold the old and the new copy of every layer at once: measured on CUDA, a decode step in
    which four layers grew took four times the memory of one layer.
    """
    kinds = mlx_lm_module("models.cache")
    waits = mx.default_device() == mx.gpu
    for cache in caches:
        if isinstance(cache, QuantizedCache | QuantizedBatchCache):
            used = cache.used
        elif type(cache) is kinds.KVCache:
            used = cache.offset
        elif type(cache) is kinds.BatchKVCache:
            used = cache._idx
        else:
            continue
        if cache.keys is None or used + tokens <= _room(cache):
            continue
        if waits:
            mx.synchronize()  # memory of a step in flight must not be counted as the old copy
        # Grow to whole allocation steps, as admission counts; mlx-lm adds steps to any length.
        more = -(-(used + tokens) // cache.step) * cache.step - used
        held = mx.get_active_memory() - cache.nbytes
        _extend(cache, used, more)
        mx.eval(cache.keys, cache.values)
        if waits:
            waits = _released(held + cache.nbytes)


def _released(expected_bytes: int) -> bool:
    """Wait until the GPU has released the old copy; return False if it does not in time.

    A thread of MLX releases it after the result is there, but never if a kept prefix shares it.
    """
    deadline = time.monotonic() + _RELEASE_SECONDS
    while mx.get_active_memory() > expected_bytes + _ROUNDING_BYTES:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0001)
    return True


def _room(cache: Any) -> int:
    """Return the tokens that a cache's arrays have room for."""
    quantized = isinstance(cache, QuantizedCache | QuantizedBatchCache)
    return int(cache.room if quantized else cache.keys.shape[2])


def _extend(cache: Any, used: int, more: int) -> None:
    if isinstance(cache, QuantizedCache | QuantizedBatchCache):
        cache.change(lambda part: extended(part, used, more))
        return
    cache.keys = extended(cache.keys, used, more)
    cache.values = extended(cache.values, used, more)


def _merge(caches: list[Any]) -> Any:
    return type(caches[0]).merge(caches)
