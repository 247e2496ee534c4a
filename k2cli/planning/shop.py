"""The machines of the catalog that run a model as requested, cheapest first.

Offers are one to four machines of a kind, and unlike pairs and triples if they are cheaper than any
number of one kind and have memory for a prefill chunk that keeps a GPU busy. Machines that are no
longer sold are offered too, since they are bought used, and marked; their price is the last list
price.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from k2cli.errors import K2Error
from k2cli.planning.advice import most_bits
from k2cli.planning.hardware.chips import chips
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.hardware.spec import catalog_node, hardware_text, numbered
from k2cli.planning.plan import Plan
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.planning.search.candidates import GOOD_CHUNK_TOKENS
from k2cli.planning.search.strategies import fits_somehow
from k2cli.planning.speed.estimate import Band
from k2cli.sharding.recipe import Recipe
from k2cli.units import GIB

MOST_MACHINES = 4
MOST_MIXED_MACHINES = 3
MOST_MIXED_OFFERS = 3
MOST_MIXES_TRIED = 24
SMALLEST_SHARE = 0.25
"""The least memory of the smallest of mixed machines, as a share of the largest one's. A smaller
machine would add a link for little."""

WORTH_ANOTHER = 1.15
"""The factor by which one more machine must make answers faster to be offered."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Machines that run the model as requested. ``price_usd`` is their sum, None if unknown.

    ``withdrawn`` is the date since which one of them is no longer sold, empty if all are sold;
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


def shop(planner: Planner, request: PlanRequest) -> ShopResult:
    """Plan the model on the machines of the catalog.

    Raises:
        UsageError: if the request is not valid.
    """
    kinds = [
        catalog_node(chip, size) for chip in chips().values() for size in sorted(chip.memory_gib)
    ]
    problem = planner.problem(kinds[:1], request)
    # Machines hold at least one copy of the weights together.
    weights = problem.traced.slices(1).profile
    needed = weights.weights_bytes(0, weights.layer_count)
    offers = [offer for kind in kinds for offer in _of_one_kind(planner, request, kind, needed)]
    offers += _mixed(planner, request, kinds, needed, offers)
    offers.sort(key=_rank)
    return ShopResult(
        planner.model.reference, problem.context_length, request.concurrency, tuple(offers)
    )


def recipe_for_the_catalog(planner: Planner, request: PlanRequest) -> Recipe | None:
    """Return the recipe with the most bits that fits on machines of the catalog, or None."""
    kinds = [catalog_node(chip, size) for chip in chips().values() for size in chip.memory_gib]
    largest = max(kinds, key=lambda kind: kind.limit_bytes)
    return most_bits(planner, numbered([largest] * MOST_MACHINES), request)[0]


def _rank(offer: Offer) -> tuple[bool, int, float]:
    decode = offer.decode_tokens_per_second
    return offer.price_usd is None, offer.price_usd or 0, -decode.expected if decode else 0.0


def _of_one_kind(
    planner: Planner, request: PlanRequest, kind: NodeMemory, needed: int
) -> Iterator[Offer]:
    """Yield the fewest machines that fit, and more if they are faster by ``WORTH_ANOTHER``."""
    fastest = 0.0
    for count in range(1, MOST_MACHINES + 1):
        if kind.limit_bytes * count < needed:
            continue
        offer = _offer(planner, request, [kind] * count)
        if offer is None:
            continue
        rate = offer.decode_tokens_per_second
        expected = rate.expected if rate is not None else 0.0
        if fastest == 0.0 or expected >= fastest * WORTH_ANOTHER:
            yield offer
        fastest = max(fastest, expected, 1e-9)


def _mixed(
    planner: Planner,
    request: PlanRequest,
    kinds: Sequence[NodeMemory],
    needed: int,
    others: Sequence[Offer],
) -> list[Offer]:
    """Return mixed machines that cost less than any number of like ones, cheapest first."""
    bound = min((each.price_usd for each in others if each.price_usd is not None), default=None)
    mixes = sorted(_mixes(kinds, needed, bound), key=_price)
    good = request
    if request.chunk_tokens is None:
        good = replace(request, chunk_tokens=GOOD_CHUNK_TOKENS)
    found: list[Offer] = []
    for mix in mixes[:MOST_MIXES_TRIED]:
        if not _fits_by_pipeline(planner, good, mix):
            continue
        offer = _offer(planner, request, mix)
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
    """Yield mixed machines of known price and speed that hold the weights, below a price."""
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


def _fits_by_pipeline(planner: Planner, request: PlanRequest, kinds: Sequence[NodeMemory]) -> bool:
    """True if a pipeline fits: a cheap check, without speeds, before a mix is planned.

    Tensor slices are of equal size on unlike machines, so if they fit, a pipeline fits too.
    """
    try:
        return fits_somehow(planner.problem(numbered(kinds), request), "pipeline")
    except K2Error:
        return False


def _offer(planner: Planner, request: PlanRequest, kinds: Sequence[NodeMemory]) -> Offer | None:
    machines = numbered(kinds)
    try:
        plan = planner.plan(machines, request, limits=False)
    except K2Error:  # the requested strategy is impossible on so many machines
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
