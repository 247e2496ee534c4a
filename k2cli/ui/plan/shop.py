"""Table of machines that can run a model, cheapest first, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from k2cli.ui.output import print_line
from k2cli.units import format_bytes

if TYPE_CHECKING:
    from k2cli.planning.shop import Offer, ShopResult
    from k2cli.planning.speed.estimate import Band

_WIDTH = 80
MOST_OFFERS = 16
"""Limit of offers in the table; ``--json`` lists all of them."""


def shop_lines(result: ShopResult) -> list[str]:
    """Format headline, table and notes."""
    sequences = "1 sequence" if result.concurrency == 1 else f"{result.concurrency} sequences"
    lines = [
        *textwrap.wrap(
            f"machines that hold {result.model} with {sequences} of "
            f"{result.context_length:,} tokens",
            _WIDTH,
        ),
        "",
    ]
    if not result.offers:
        return [*lines, "none of the catalog"]
    shown = result.offers[:MOST_OFFERS]
    width = min(34, max(len(offer.hardware) for offer in shown))
    lines.append(f"{'USD':>7}  {'machines':<{width}}  {'decode':>9} {'prefill':>7} {'spare':>8}")
    for offer in shown:
        lines += _offer_lines(offer, width)
    hidden = len(result.offers) - len(shown)
    if hidden:
        lines.append(f"{'':>7}  ... and {hidden} more: --shop --json lists all")
    return [*lines, "", *_notes(shown)]


def _offer_lines(offer: Offer, width: int) -> list[str]:
    price = "?" if offer.price_usd is None else f"{offer.price_usd:,}"
    mark = "*" if offer.withdrawn else " "
    names = textwrap.wrap(offer.hardware, width)
    prefill = offer.prefill_tokens_per_second
    figures = (
        f"{_span(offer.decode_tokens_per_second):>9} "
        f"{'' if prefill is None else f'{prefill.expected:,.0f}':>7} "
        f"{format_bytes(offer.headroom_bytes):>8}"
    )
    first = f"{price:>7}{mark} {names[0]:<{width}}  {figures}  {offer.strategy}"
    return [first.rstrip(), *(f"{'':>9}{name}" for name in names[1:])]


def _span(band: Band | None) -> str:
    """Format the low and the high end of a rate."""
    if band is None:
        return "unknown"
    digits = 0 if band.high >= 20 else 1
    return f"{band.low:,.{digits}f}-{band.high:,.{digits}f}"


def _notes(offers: Sequence[Offer]) -> list[str]:
    dates = [offer.price_date for offer in offers if offer.price_date]
    notes = ["decode and prefill: predicted tokens/s of one sequence at this context"]
    if dates:
        span = " to ".join(sorted({min(dates), max(dates)}))
        notes.append(f"USD: list prices as last known ({span}), without tax")
    if any(offer.withdrawn for offer in offers):
        notes.append("*: no longer sold new, in whole or in part; its last list price")
    if any(offer.price_usd is None for offer in offers):
        notes.append("?: no price is known for a machine of it")
    return notes


def print_shop(result: ShopResult) -> None:
    """Print the offers to stdout."""
    for line in shop_lines(result):
        print_line(line)
