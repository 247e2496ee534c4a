"""Sampling of next tokens from logits, on the leader alone.

Every request has its own random key, derived from its seed and the number of tokens chosen so
far; so the same seed gives the same text on any placement and beside any other requests. Chosen
tokens stay lazy until they are read, so that the next step can be built meanwhile.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from k2cli.protocol import Sampling, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures below this choose the largest score: divided by them, scores may become infinite."""


@dataclass(slots=True)
class Sampler:
    """The sampling state of one request."""

    options: Sampling
    prompt: Sequence[int]
    _seed: int = 0
    _picked: int = 0
    _generated: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        seed = self.options.seed
        self._seed = (secrets.randbits(63) if seed is None else seed) & (2**63 - 1)

    @property
    def needs_history(self) -> bool:
        """True if there are penalties for earlier tokens, so that they must be known."""
        options = self.options
        return (
            options.repetition_penalty != 1.0
            or options.presence_penalty != 0.0
            or options.frequency_penalty != 0.0
        )

    @property
    def is_plain(self) -> bool:
        """True if the choice is always the largest logit."""
        options = self.options
        return self._is_greedy and not options.logit_bias and not self.needs_history

    @property
    def _is_greedy(self) -> bool:
        return self.options.temperature < GREEDY_BELOW

    def pick(self, logits: mx.array) -> mx.array:
        """Choose a token, lazily.

        Args:
            logits: float ``[vocabulary]``.

        Returns:
            The token id, a scalar.
        """
        scores = self._adjusted(logits)
        count, self._picked = self._picked, self._picked + 1
        if self._is_greedy:
            return mx.argmax(scores)
        scores = truncate(scores / self.options.temperature, self.options)
        # One key per token, spread by the golden ratio as splitmix64 does (Steele et al. 2014).
        key = mx.random.key((self._seed + count * 0x9E3779B97F4A7C15) & (2**63 - 1))
        return mx.random.categorical(scores, key=key)

    def take_back(self, count: int) -> None:
        """Forget the last choices: they followed a draft that was wrong."""
        self._picked -= count

    def record(self, token: int) -> None:
        """Count a chosen token for the penalties."""
        self._generated[token] += 1

    def logprob(self, logits: mx.array, token: int) -> TokenLogprob | None:
        """Return log probabilities, before temperature, of a token and the best ones, or None.

        None if the request does not want them. Forbidden tokens, whose logits are -inf, are not
        among the best. Call it before ``record`` of that token.
        """
        wanted = self.options.top_logprobs
        if wanted is None:
            return None
        scores = self._adjusted(logits)
        logprobs = scores - mx.logsumexp(scores)
        best = cast(list[int], mx.argsort(-logprobs)[:wanted].tolist()) if wanted else []
        values = cast(list[float], logprobs[mx.array([token, *best])].tolist())
        pairs = zip(best, values[1:], strict=True)
        return TokenLogprob(values[0], [pair for pair in pairs if pair[1] > -math.inf])

    def _adjusted(self, logits: mx.array) -> mx.array:
        options = self.options
        scores = logits.astype(mx.float32)
        if options.logit_bias:
            scores = _add_at(scores, options.logit_bias)
        if options.presence_penalty or options.frequency_penalty:
            scores = _add_at(
                scores,
                {
                    token: -options.presence_penalty - options.frequency_penalty * count
                    for token, count in self._generated.items()
                },
            )
        if options.repetition_penalty != 1.0:
            seen = {*self.prompt, *self._generated}
            scores = _repetition(scores, seen, options.repetition_penalty)
        return scores


def _add_at(scores: mx.array, amounts: Mapping[int, float]) -> mx.array:
    amounts = {token: amount for token, amount in amounts.items() if 0 <= token < scores.size}
    if not amounts:
        return scores
    return scores.at[mx.array(list(amounts))].add(mx.array(list(amounts.values())))


def _repetition(scores: mx.array, tokens: set[int], penalty: float) -> mx.array:
    """Divide positive and multiply negative scores of seen tokens (Keskar et al. 2019, CTRL)."""
    seen = mx.array(sorted(token for token in tokens if token < scores.size))
    values = scores[seen]
    changed = mx.where(values > 0, values / penalty, values * penalty)
    return mx.put_along_axis(scores, seen, changed, axis=0)


def truncate(scores: mx.array, options: Sampling) -> mx.array:
    """Exclude tokens by top-k, then top-p, then min-p; ``scores`` float ``[vocabulary]``.

    Top-p keeps the smallest set of tokens whose probability reaches p (Holtzman et al. 2020);
    min-p keeps tokens of at least min_p times the best one's probability (Nguyen et al. 2024).
    """
    lowest = mx.array(-mx.inf, scores.dtype)
    if 0 < options.top_k < scores.size:
        threshold = mx.sort(scores)[-options.top_k]
        scores = mx.where(scores >= threshold, scores, lowest)
    if options.top_p < 1:
        order = mx.argsort(-scores)
        probabilities = mx.softmax(scores[order], precise=True)
        before = mx.cumsum(probabilities) - probabilities
        kept = mx.where(before < options.top_p, scores[order], lowest)
        scores = mx.put_along_axis(scores, order, kept, axis=0)
    if options.min_p > 0:
        threshold = mx.max(scores) + mx.log(mx.array(options.min_p))
        scores = mx.where(scores >= threshold, scores, lowest)
    return scores
