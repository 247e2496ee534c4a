"""The reasons for a placement: the table of compared placements, and one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from k2cli.choices import Strategy
from k2cli.planning.plan import Alternative
from k2cli.planning.search.candidates import GOOD_CHUNK_TOKENS, Candidate
from k2cli.units import format_bytes


def alternatives(
    chosen: Candidate, found: Sequence[Candidate], obstacles: Mapping[Strategy, str]
) -> tuple[Alternative, ...]:
    """Return everything that was compared, the chosen placement first, the impossible ones last."""
    rivals = [each for each in found if each is not chosen]
    return (
        _alternative(chosen, chosen, rivals),
        *(_alternative(each, chosen, rivals) for each in rivals),
        *(
            Alternative(strategy, False, False, False, _without_prefix(obstacle))
            for strategy, obstacle in obstacles.items()
        ),
    )


def fits_alone(single: Candidate) -> Alternative:
    """Return a machine on which the model fits without the others."""
    return _described(single, chosen=False, verdict=f"fits {single.nodes[0].name} alone")


def _without_prefix(obstacle: str) -> str:
    return obstacle.removeprefix("tensor parallelism is not possible: ")


def _alternative(each: Candidate, chosen: Candidate, rivals: Sequence[Candidate]) -> Alternative:
    why = _why(chosen, rivals) if each is chosen else _why_not(each, chosen)
    return _described(each, chosen=each is chosen, verdict=why)


def _described(each: Candidate, *, chosen: bool, verdict: str) -> Alternative:
    speed = each.speed
    decode = None if speed is None else speed.decode_tokens_per_second.expected
    prefill = None if speed is None else speed.prefill_tokens_per_second.expected
    return Alternative(
        name=each.placement.strategy,
        possible=True,
        fits=each.fits,
        chosen=chosen,
        verdict=verdict,
        prefill_chunk_tokens=each.chunk_tokens,
        headroom_bytes=each.headroom_bytes,
        decode_tokens_per_second=decode,
        prefill_tokens_per_second=prefill,
    )


def _why_not(each: Candidate, chosen: Candidate) -> str:
    if not each.fits:
        return f"lacks {format_bytes(-each.headroom_bytes)}"
    if each.chunk_tokens < min(chosen.chunk_tokens, GOOD_CHUNK_TOKENS):
        return f"room for prefill chunks of {each.chunk_tokens} only"
    if each.exchange_seconds is None or chosen.exchange_seconds is None:
        return "exchanges more between nodes"
    return f"takes {each.exchange_seconds / chosen.exchange_seconds:.2f} times as long for the same"


def _why(chosen: Candidate, rivals: Sequence[Candidate]) -> str:
    if len(chosen.budgets) == 1:
        return "there is one node"
    if not rivals:
        return "the only one possible"
    rival = rivals[0]
    name = rival.placement.strategy
    if not chosen.fits:
        return f"neither fits; {chosen.placement.strategy} lacks least"
    if not rival.fits:
        return f"{name} does not fit"
    if rival.chunk_tokens < min(chosen.chunk_tokens, GOOD_CHUNK_TOKENS):
        return (
            f"room for prefill chunks of {chosen.chunk_tokens} tokens, {name} has for "
            f"{rival.chunk_tokens}"
        )
    if chosen.exchange_seconds is None or rival.exchange_seconds is None:
        return "a pipeline exchanges least between nodes"
    exchange = chosen.exchange
    many = exchange.concurrency
    requests = "a request" if many == 1 else f"{many} requests"
    return (
        f"sooner done with {requests} of {exchange.prompt_tokens:,} tokens with an answer of "
        f"{exchange.answer_tokens}: {chosen.exchange_seconds:.0f} s, "
        f"{name} {rival.exchange_seconds:.0f} s (predicted)"
    )


def reason(compared: Sequence[Alternative]) -> str:
    """Explain the choice of the strategy in one sentence."""
    impossible = [each.verdict for each in compared if not each.possible]
    return impossible[0] if impossible else compared[0].verdict
