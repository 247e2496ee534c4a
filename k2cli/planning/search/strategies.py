"""The best candidate of each strategy, and the limits: longest context and most sequences.

More context or sequences never need less memory, so the limits are found by halving. For them the
prefill chunk may become as small as necessary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from k2cli.choices import Strategy
from k2cli.errors import UsageError
from k2cli.planning.config_check import model_context_length
from k2cli.planning.request import MAX_CONCURRENCY, MAX_CONTEXT_LENGTH
from k2cli.planning.search.candidates import (
    GOOD_CHUNK_TOKENS,
    Candidate,
    PlanningProblem,
    make_candidate,
    node_budgets,
    preference,
)
from k2cli.planning.search.pipeline import pipeline
from k2cli.sharding.placement import Placement, RankPlacement


def compare(
    problem: PlanningProblem, strategies: Sequence[Strategy]
) -> tuple[list[Candidate], dict[Strategy, str]]:
    """Return a candidate of every possible strategy, and the obstacle to each of the others.

    Raises:
        UsageError: if no strategy is possible.
    """
    found: list[Candidate] = []
    obstacles: dict[Strategy, str] = {}
    failure: UsageError | None = None
    for strategy in strategies:
        try:
            found.append(candidate(problem, strategy))
        except UsageError as error:
            obstacles[strategy], failure = error.message, failure or error
    if not found:
        assert failure is not None
        hint = failure.hint
        if len(strategies) > 1:
            hint = "name one machine: there it need not be divided"
        elif problem.request.transport == "nccl":
            hint = "--backend ring --parallel pipeline"  # NCCL has no pipeline
        raise UsageError("; ".join(dict.fromkeys(obstacles.values())), hint)
    return found, obstacles


def candidate(problem: PlanningProblem, strategy: Strategy) -> Candidate:
    """Return the best candidate of a strategy.

    Latent attention is computed in blocks if memory asks for them: if nothing fits without, or only
    a prefill chunk that is too small to keep a GPU busy.

    Raises:
        UsageError: if the strategy is impossible for this model or number of nodes.
    """
    found = _candidate(problem, strategy)
    wanted = min(problem.chunks[0], GOOD_CHUNK_TOKENS)
    if not problem.traced.model.shape.own_attention:
        return found
    if found.fits and found.chunk_tokens >= wanted:
        return found
    in_blocks = _candidate(replace(problem, in_blocks=True), strategy)
    return in_blocks if preference(in_blocks) > preference(found) else found


def _candidate(problem: PlanningProblem, strategy: Strategy) -> Candidate:
    return pipeline(problem) if strategy == "pipeline" else whole_layers(problem, strategy)


def fits_somehow(problem: PlanningProblem, strategy: Strategy) -> bool:
    """True if a strategy fits with the smallest prefill chunk."""
    small = replace(problem.request, chunk_tokens=problem.chunks[-1])
    return candidate(replace(problem, request=small, timed=False), strategy).fits


def whole_layers(problem: PlanningProblem, strategy: Strategy) -> Candidate:
    """Place all layers on one node, or a slice of each on every node, with the largest chunk."""
    slices = problem.traced.slices(len(problem.nodes) if strategy == "tensor" else 1)
    count = slices.profile.layer_count
    ranks = tuple(
        RankPlacement(rank, node.name, (0, count)) for rank, node in enumerate(problem.nodes)
    )
    placement = Placement(strategy, ranks, slices.head)
    for chunk in problem.chunks:
        budgets = node_budgets(problem, slices, placement, problem.nodes, chunk)
        if all(budget.headroom_bytes >= 0 for budget in budgets):
            break
    return make_candidate(problem, slices, placement, problem.nodes, chunk, budgets)


def greatest(fits: Callable[[int], bool], most: int) -> int:
    """Return the greatest number from 1 to ``most`` that fits, or 0; ``fits`` must be monotone.

    Tries ``most`` first, then halves: about ``log2(most)`` calls.
    """
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def max_context_length(problem: PlanningProblem, strategies: Sequence[Strategy]) -> int:
    """Return the longest context that fits with one of the strategies, or 0."""
    most = model_context_length(problem.traced.model.config) or MAX_CONTEXT_LENGTH

    def fits(context_length: int) -> bool:
        return _fits_any(replace(problem, context_length=context_length), strategies)

    return greatest(fits, most)


def max_concurrency(problem: PlanningProblem, strategies: Sequence[Strategy]) -> int:
    """Return the most sequences that fit with one of the strategies, or 0."""

    def fits(concurrency: int) -> bool:
        request = replace(problem.request, concurrency=concurrency)
        return _fits_any(replace(problem, request=request), strategies)

    return greatest(fits, MAX_CONCURRENCY)


def _fits_any(problem: PlanningProblem, strategies: Sequence[Strategy]) -> bool:
    for strategy in strategies:
        try:
            if fits_somehow(problem, strategy):
                return True
        except UsageError:  # impossible for this model or number of nodes, at any length
            continue
    return False
