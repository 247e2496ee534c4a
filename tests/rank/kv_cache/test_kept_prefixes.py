"""Kept prefixes: what the leader decides, carried out on the caches of a rank.

The caches hold numbers that follow from the tokens, so that each can be told from all others.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.mlx_lm_package import mlx_lm_module
from k2cli.protocol import CloseSequence, Decision, DropPrefix, SplitPrefix
from k2cli.rank.engine.prefixes.keeper import PrefixKeeper
from k2cli.rank.engine.prefixes.tree import LEAST_REUSE_TOKENS, node_tokens
from k2cli.rank.kv_cache.kept_prefixes import KeptPrefixes
from k2cli.rank.kv_cache.segments import can_cut
from k2cli.rank.kv_cache.table import CacheTable
from k2cli.sharding.stage import cut_stage, make_cache
from tests.support.latent_models import TOKENS, latent_model
from tests.support.memory import held_bytes

WIDTHS = (24, 8)


def _plain(tokens: Sequence[int], layer: int, room: int) -> Any:
    """A cache of one layer, with room for more tokens, as a sequence has it that was computed."""
    cache = mlx_lm_module("models.cache").KVCache()
    if tokens:
        numbers = mx.array(tokens, dtype=mx.float32)[None, None, :, None] + 0.25 * layer
        numbers = mx.pad(numbers, [(0, 0), (0, 0), (0, room), (0, 0)], constant_values=-1)
        cache.keys, cache.values = (mx.contiguous(numbers * mx.ones((width,))) for width in WIDTHS)
        cache.offset = len(tokens)
        mx.eval(cache.keys, cache.values)
    return cache


def _plains(tokens: Sequence[int], layers: int) -> list[Any]:
    return [_plain(tokens, layer, 0) for layer in range(layers)]


def _caches(tokens: Sequence[int], room: int = 0) -> list[Any]:
    """Two layers: a plain one, and a list of two as deepseek_v32 has."""
    pair = mlx_lm_module("models.cache").CacheList(_plain(tokens, 1, room), _plain(tokens, 2, room))
    return [_plain(tokens, 0, room), pair]


@dataclass
class Rank:
    """A rank's kept prefixes, and the leader's keeper of them."""

    kept: KeptPrefixes = field(default_factory=lambda: KeptPrefixes(True, lambda: _caches([])))
    next_number: int = 1

    def __post_init__(self) -> None:
        self.keeper = PrefixKeeper(self, whole_only=False)

    def submit(self, decision: Decision) -> None:
        match decision:
            case SplitPrefix():
                self.kept.split(decision.prefix, decision.above, decision.tokens)
            case DropPrefix():
                self.kept.drop(decision.prefix)
            case _:
                raise AssertionError(decision)

    def keep(self, tokens: Sequence[int], scope: str = "", room: int = 0) -> None:
        keep = self.keeper.keep(tokens, scope)
        if keep.prefix is not None:
            caches = _caches(tokens, room)
            self.kept.keep(keep.prefix, array("i", tokens), caches, keep.below, keep.first)

    def check_open(self, prompt: list[int], scope: str) -> int:
        hit = self.keeper.tree.best(prompt, scope)
        if hit is None:
            return 0
        tokens, caches = self.kept.open(hit.prefix, hit.tokens)
        assert list(tokens) == prompt[: hit.tokens]
        for cache, expected in zip(caches, _caches(prompt[: hit.tokens]), strict=True):
            leaves = zip(getattr(cache, "caches", [cache]), getattr(expected, "caches", [expected]),
                         strict=True)  # fmt: skip
            for leaf, known in leaves:
                assert leaf.offset == hit.tokens
                assert leaf.keys.shape[2] % 256 == 0
                for one, other in ((leaf.keys, known.keys), (leaf.values, known.values)):
                    assert mx.array_equal(one[..., : hit.tokens, :], other)
        return hit.tokens


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_every_prompt_gets_the_cache_of_its_own_beginning(seed: int) -> None:
    """Conversations that branch anywhere; memory for some of them."""
    draw, rank, known = random.Random(seed), Rank(), [("", [1])]
    for _ in range(30):
        scope, earlier = draw.choice(known)
        start = earlier[: draw.randint(0, len(earlier))]
        tokens = [*start, *draw.choices(range(3), k=draw.choice((0, 1, 9, 40, 300)))]
        scope = draw.choice((scope, scope, "other"))
        prompt = [*tokens, 7]
        shared = max((_shared(tokens, other) for at, other in known if at == scope), default=0)
        assert rank.check_open(prompt, scope) <= shared
        if tokens:
            rank.keep(tokens, scope, draw.choice((0, 5)))
            known.append((scope, tokens))
            least = len(tokens) - LEAST_REUSE_TOKENS + 1
            assert rank.check_open(prompt, scope) >= (least if least >= LEAST_REUSE_TOKENS else 0)
        rank.keeper.evict(0, draw.choice((900, 10_000)), ())
    tree = rank.keeper.tree
    assert tree.tokens() == sum(node_tokens(node[2]) for node in rank.kept.checksums())
    while (oldest := tree.oldest()) is not None:
        rank.keeper.drop(oldest)
    assert tree.tokens() == len(rank.kept) == 0


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("turns", [2, 5])
def test_what_conversations_share_takes_memory_once(turns: int) -> None:
    """Of 2,000 shared tokens and tails of 300, each is held once, after the split too."""
    draw = random.Random(turns)
    shared = draw.choices(range(10_000), k=2000)
    rank, base = Rank(), held_bytes()
    for turn in range(turns):
        rank.keep([*shared, turn, *draw.choices(range(10_000), k=299)], room=200)
    per_token = 3 * sum(WIDTHS) * 4
    tokens = 2000 + 300 * turns
    # MLX leaves up to 16 KB behind a copy of an array that has that much more.
    slack = len(rank.kept) * 6 * 16384
    assert tokens * per_token <= held_bytes() - base <= tokens * per_token + slack
    assert rank.keeper.tree.tokens() <= tokens + 64 * len(rank.kept)


def test_a_prefix_that_is_dropped_as_it_is_opened_is_never_held_twice() -> None:
    """Else the cache of a long conversation would take twice its memory at each turn."""
    layers, tokens = 16, list(range(4000))
    kept = KeptPrefixes(True, lambda: _plains([], layers))
    kept.keep(1, array("i", tokens[:2500]), _plains(tokens[:2500], layers), None, 0)
    kept.keep(2, array("i", tokens), _plains(tokens, layers), 1, 2500)
    before, whole = held_bytes(), layers * 4096 * sum(WIDTHS) * 4
    known, caches = kept.open(2, len(tokens), [2, 1])
    assert mx.get_peak_memory() - before < whole / 4
    assert list(known) == tokens
    assert len(kept) == 0
    for layer, cache in enumerate(caches):
        assert mx.array_equal(cache.keys[..., :4000, :], _plain(tokens, layer, 0).keys)


@pytest.mark.parametrize("name", ["kimi_k2", "deepseek_v32"])
def test_a_sequence_goes_on_from_a_shared_beginning_as_from_its_own(name: str) -> None:
    model = latent_model(name)
    stage = cut_stage(model, 0, len(model.layers))
    assert can_cut(stage)
    table = CacheTable(stage)

    def compute(sequence: int, tokens: list[int]) -> mx.array:
        table.feed(sequence, tokens)
        return stage.forward(mx.array([tokens]), table.sequences[sequence])

    prompts = [TOKENS[:100], [*TOKENS[:60], *TOKENS[100:150]], [*TOKENS[:60], 5, *TOKENS[:20]]]
    keeper = Rank().keeper
    keeper._sender = _Into(table)
    for sequence, prompt in enumerate(prompts):
        hit = keeper.tree.best(prompt)
        assert (hit.tokens if hit else 0) == (60 if sequence else 0)
        table.open(sequence, hit.prefix if hit else None, hit.tokens if hit else 0)
        found = compute(sequence, prompt[hit.tokens if hit else 0 :])[:, -1]
        expected = model(mx.array([prompt]), cache=make_cache(model))[:, -1]
        assert float(mx.abs(found - expected).max()) < 2e-5  # type: ignore[arg-type]
        keep = keeper.keep(prompt, "")
        table.close(sequence, CloseSequence(1, sequence, keep.prefix, keep.below, keep.first))
    assert len(table.prefixes) == 4


@dataclass(frozen=True)
class _Into:
    """Carries out the keeper's decisions on a table."""

    table: CacheTable
    next_number: int = 1

    def submit(self, decision: Decision) -> None:
        assert isinstance(decision, SplitPrefix)
        self.table.prefixes.split(decision.prefix, decision.above, decision.tokens)


def test_leaves_go_first_and_those_that_are_waited_for_last() -> None:
    rank = Rank()
    rank.keep([*range(300), *range(1000, 1300)])
    rank.keep([*range(300), *range(2000, 2300)])
    rank.keep([*range(5000, 5300)])
    tree = rank.keeper.tree
    wanted = tree.find([*range(300), *range(1000, 1300), 1])
    assert wanted is not None
    order = []
    while (oldest := tree.oldest({wanted.prefix})) is not None:
        order.append(tree.path_tokens(oldest)[-1])
        rank.keeper.drop(oldest)
    assert order == [2299, 5299, 1299, 299]
