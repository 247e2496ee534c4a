"""Which machines of the catalog run a model at a context and concurrency, cheapest first.

One to four machines of a kind, and unlike pairs and triples where they are cheaper than any number
of one kind and have room for a prefill chunk that keeps a GPU busy. Machines that are no longer
sold are offered too, since they are bought used, and marked; their price is the last list price.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from k2cli.errors import K2Error
from k2cli.planning.advice import hardware_text, most_bits, numbered
from k2cli.planning.hardware.chips import chips
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.hardware.spec import catalog_node
from k2cli.planning.plan import Plan
from k2cli.planning.planner import Planner, Wishes
from k2cli.planning.search.candidates import GOOD_CHUNK_TOKENS, fits_somehow
from k2cli.planning.speed.estimate import Band
from k2cli.sharding.recipe import Recipe
from k2cli.units import GIB

MOST_MACHINES = 4
MOST_MIXED_MACHINES = 3
MOST_MIXED_OFFERS = 3
MOST_MIXES_TRIED = 24
SMALLEST_SHARE = 0.25
"""Of mixed machines the smallest has at least this share of the largest one's memory: less adds a
link for little."""

WORTH_ANOTHER = 1.15
"""A further machine is offered if it makes answers faster by this factor."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Machines that run the model as asked. ``price_usd`` is of all of them, None if unknown.

    ``withdrawn`` says since when a machine of it is no longer sold, empty if all are;
    ``price_date`` is the oldest of the prices' dates.
    """

    hardware: str
    machines: int
    price_usd: int | None
    price_date: str
    withdrawn: str
    strategy: str
    prefill_chunk_tokens: int
    headroom_bytes: int
    decode_tokens_per_second: Band | None
    prefill_tokens_per_second: Band | None


@dataclass(frozen=True, slots=True)
class ShopResult:
    """All offers for a model and a request, cheapest first, those without a known price last."""

    model: str
    context_length: int
    concurrency: int
    offers: tuple[Offer, ...]
    schema_version: int = 1


def shop(planner: Planner, wishes: Wishes) -> ShopResult:
    """Plan the model on the machines of the catalog.

    Raises:
        UsageError: for wishes that make no sense.
    """
    kinds = [
        catalog_node(chip, size) for chip in chips().values() for size in sorted(chip.memory_gib)
    ]
    ground = planner.ground(kinds[:1], wishes)
    # Whatever else a machine has to hold, together they hold the weights once.
    weights = ground.model.slices(1).profile
    needed = weights.weights_bytes(0, weights.layer_count)
    offers = [offer for kind in kinds for offer in _of_one_kind(planner, wishes, kind, needed)]
    offers += _mixed(planner, wishes, kinds, needed, offers)
    offers.sort(key=_rank)
    return ShopResult(
        planner.model, ground.demand.context_length, wishes.concurrency, tuple(offers)
    )


def recipe_for_the_catalog(planner: Planner, wishes: Wishes) -> Recipe | None:
    """The recipe of most bits with which some machines of the catalog hold the model, or None.

    What to shop for where nothing holds it as it is.
    """
    kinds = [catalog_node(chip, size) for chip in chips().values() for size in chip.memory_gib]
    largest = max(kinds, key=lambda kind: kind.limit_bytes)
    return most_bits(planner, numbered([largest] * MOST_MACHINES), wishes)[0]


def _rank(offer: Offer) -> tuple[bool, int, float]:
    decode = offer.decode_tokens_per_second
    return offer.price_usd is None, offer.price_usd or 0, -decode.expected if decode else 0.0


def _of_one_kind(
    planner: Planner, wishes: Wishes, kind: NodeMemory, needed: int
) -> Iterator[Offer]:
    """The fewest machines that do, and more where that is worth it."""
    fastest = 0.0
    for count in range(1, MOST_MACHINES + 1):
        if kind.limit_bytes * count < needed:
            continue
        offer = _offer(planner, wishes, [kind] * count)
        if offer is None:
            continue
        rate = offer.decode_tokens_per_second
        expected = rate.expected if rate is not None else 0.0
        if fastest == 0.0 or expected >= fastest * WORTH_ANOTHER:
            yield offer
        fastest = max(fastest, expected, 1e-9)


def _mixed(
    planner: Planner,
    wishes: Wishes,
    kinds: Sequence[NodeMemory],
    needed: int,
    others: Sequence[Offer],
) -> list[Offer]:
    """Unlike machines that together cost less than any number of like ones, cheapest first."""
    bound = min((each.price_usd for each in others if each.price_usd is not None), default=None)
    mixes = sorted(_mixes(kinds, needed, bound), key=_price)
    good = wishes
    if wishes.chunk_tokens is None:
        good = replace(wishes, chunk_tokens=GOOD_CHUNK_TOKENS)
    found: list[Offer] = []
    for mix in mixes[:MOST_MIXES_TRIED]:
        if not _fits_by_pipeline(planner, good, mix):
            continue
        offer = _offer(planner, wishes, mix)
        if offer is not None:
            found.append(offer)
        if len(found) == MOST_MIXED_OFFERS:
            break
    return found


def _price(machines: Sequence[NodeMemory]) -> int:
    return sum(machine.price_usd or 0 for machine in machines)


def _mixes(
    kinds: Sequence[NodeMemory], needed: int, bound: int | None
) -> Iterator[tuple[NodeMemory, ...]]:
    """Unlike machines of known prices and speeds, below a price, that hold the weights together."""
    usable = [
        kind
        for kind in kinds
        if kind.price_usd is not None and kind.gpu_flops_per_second is not None
    ]
    for count in range(2, MOST_MIXED_MACHINES + 1):
        for mix in combinations_with_replacement(usable, count):
            limits = [kind.limit_bytes for kind in mix]
            if len(set(mix)) == 1 or min(limits) < SMALLEST_SHARE * max(limits):
                continue
            if sum(limits) >= needed and (bound is None or _price(mix) < bound):
                yield mix


def _fits_by_pipeline(planner: Planner, wishes: Wishes, kinds: Sequence[NodeMemory]) -> bool:
    """A quick look, without speeds, before a mix is planned: slices of unlike machines are alike,
    so where they fit a pipeline fits too.
    """
    try:
        return fits_somehow(planner.ground(numbered(kinds), wishes), "pipeline")
    except K2Error:
        return False


def _offer(planner: Planner, wishes: Wishes, kinds: Sequence[NodeMemory]) -> Offer | None:
    machines = numbered(kinds)
    try:
        plan = planner.plan(machines, wishes, limits=False)
    except K2Error:  # a strategy that was asked for is impossible on so many
        return None
    return _offer_of(plan, machines) if plan.fits else None


def _offer_of(plan: Plan, machines: Sequence[NodeMemory]) -> Offer:
    sold = [chips()[node.chip].sold(node.memory_bytes // GIB) for node in machines]
    prices = [node.price_usd for node in machines]
    dates = [each.price_date for each in sold if each is not None and each.price_date]
    withdrawn = [each.withdrawn for each in sold if each is not None and each.withdrawn]
    speed = plan.speed
    return Offer(
        hardware=hardware_text(machines) or "",
        machines=len(machines),
        price_usd=None if None in prices else sum(price or 0 for price in prices),
        price_date=min(dates, default=""),
        withdrawn=min(withdrawn, default=""),
        strategy=plan.placement.strategy,
        prefill_chunk_tokens=plan.request.prefill_chunk_tokens,
        headroom_bytes=min(node.headroom_bytes for node in plan.nodes),
        decode_tokens_per_second=None if speed is None else speed.decode_tokens_per_second,
        prefill_tokens_per_second=None if speed is None else speed.prefill_tokens_per_second,
    )
