"""Chooses the next token from logits, on the leader alone.

Every request has its own random key, derived from its seed and the number of tokens that it has
generated; so the same seed gives the same text on any placement and beside any other requests.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from k2cli.runtime.protocol import Sampling, TokenLogprob


@dataclass(slots=True)
class Sampler:
    """The sampling state of one request."""

    options: Sampling
    prompt: Sequence[int]
    _seed: int = 0
    _generated: Counter[int] = field(default_factory=Counter)
    _count: int = 0

    def __post_init__(self) -> None:
        seed = self.options.seed
        self._seed = (secrets.randbits(63) if seed is None else seed) & (2**63 - 1)

    def choose(self, logits: mx.array) -> tuple[int, TokenLogprob | None]:
        """Choose a token.

        Args:
            logits: float ``[vocabulary]``.

        Returns:
            The token id, and its log probability (before temperature) if it was asked for.
        """
        scores = self._penalised(logits.astype(mx.float32))
        token = cast(int, self._pick(scores).item())
        self._generated[token] += 1
        self._count += 1
        return token, self._logprob(scores, token)

    def _pick(self, scores: mx.array) -> mx.array:
        if self.options.temperature == 0:
            return mx.argmax(scores)
        scores = truncate(scores / self.options.temperature, self.options)
        # One key per token, spread by the golden ratio as splitmix64 does (Steele et al. 2014).
        key = mx.random.key((self._seed + self._count * 0x9E3779B97F4A7C15) & (2**63 - 1))
        return mx.random.categorical(scores, key=key)

    def _penalised(self, scores: mx.array) -> mx.array:
        options = self.options
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
            scores = _repetition(
                scores, {*self.prompt, *self._generated}, options.repetition_penalty
            )
        return scores

    def _logprob(self, scores: mx.array, token: int) -> TokenLogprob | None:
        wanted = self.options.top_logprobs
        if wanted is None:
            return None
        logprobs = scores - mx.logsumexp(scores)
        best = cast(list[int], mx.argsort(-logprobs)[:wanted].tolist()) if wanted else []
        values = cast(list[float], logprobs[mx.array([token, *best])].tolist())
        return TokenLogprob(values[0], list(zip(best, values[1:], strict=True)))


def _add_at(scores: mx.array, amounts: Mapping[int, float]) -> mx.array:
    amounts = {token: amount for token, amount in amounts.items() if 0 <= token < scores.size}
    if not amounts:
        return scores
    return scores.at[mx.array(list(amounts))].add(mx.array(list(amounts.values())))


def _repetition(scores: mx.array, tokens: set[int], penalty: float) -> mx.array:
    """Divide positive and multiply negative scores of seen tokens (Keskar et al. 2019, CTRL)."""
    seen = mx.array(sorted(token for token in tokens if token < scores.size))
    values = scores[seen]
    scores[seen] = mx.where(values > 0, values / penalty, values * penalty)
    return scores


def truncate(scores: mx.array, options: Sampling) -> mx.array:
    """Rule out tokens by top-k, then top-p, then min-p; ``scores`` float ``[vocabulary]``.

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
