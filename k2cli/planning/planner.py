"""Makes a plan: reads what is known of the model, traces placements, adds up each node's memory.

The only part of planning that touches files (config and headers) is ``_read_model``; everything
after it is computed from values. Weights and KV cache come from tracing and are exact; activation
and overhead are modelled; the limit is what the hardware says or is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast

from k2cli.errors import UsageError
from k2cli.planning import activation
from k2cli.planning.activation import PREFILL_CHUNKS, ActivationShape
from k2cli.planning.config_check import check_config, model_context_length
from k2cli.planning.hardware import NodeMemory, share_machines
from k2cli.planning.memory import RUNTIME_BYTES, node_budget
from k2cli.planning.plan import Mark, NodeBudget, Plan, PlannedModel, PlannedRequest
from k2cli.planning.split import balanced_split
from k2cli.planning.stored import describe_quantization, stored_bytes_of_config
from k2cli.sharding.placement import Placement, RankPlacement, Strategy, even_split

if TYPE_CHECKING:
    from k2cli.sharding.footprint import ModelFacts, RankFootprint

DEFAULT_CONTEXT_LENGTH = 32_768
MAX_CONTEXT_LENGTH = 100_000_000
MAX_CONCURRENCY = 4096
_GOOD_CHUNK_TOKENS = 512
"""A prefill chunk that keeps a GPU busy; a strategy that allows less is second choice."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STRATEGIES = ("auto", "single", "pipeline", "tensor")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_STORED_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

WantedStrategy = Literal["auto", "single", "pipeline", "tensor"]


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of the model before it is placed."""

    reference: str
    config: dict[str, Any]
    stored: Mapping[str, tuple[str, tuple[int, ...]]] | None
    stored_bytes: int
    stored_mark: Mark
    facts: ModelFacts
    shape: ActivationShape


@dataclass(frozen=True, slots=True)
class _Demand:
    """What a plan must have room for."""

    context_length: int
    concurrency: int
    dtype: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A placement with its ledger."""

    placement: Placement
    chunk_tokens: int
    budgets: tuple[NodeBudget, ...]

    @property
    def headroom_bytes(self) -> int:
        """On the tightest node."""
        return min(budget.headroom_bytes for budget in self.budgets)

    @property
    def fits(self) -> bool:
        """Whether no node is over its limit."""
        return self.headroom_bytes >= 0


def make_plan(
    model: str,
    nodes: Sequence[NodeMemory],
    *,
    strategy: WantedStrategy | str = "auto",
    context_length: int | None = None,
    concurrency: int = 1,
    dtype: str = "auto",
) -> Plan:
    """Plan a model on nodes; a plan that does not fit is returned too, with ``fits`` false.

    Args:
        model: a model reference. A folder with only a ``config.json`` is enough.
        nodes: one per rank, rank 0 first. Nodes of one name are ranks on one machine and share
            its limit.
        strategy: ``auto`` chooses by what is possible and fits, and says why in ``plan.reason``.
        context_length: tokens per sequence; the model's maximum or 32,768 if None, whichever is
            less.
        concurrency: sequences that are held at a time.
        dtype: ``auto`` is the checkpoint's float type, and float32 where a node computes on CPU.

    Raises:
        UsageError: for a request or config that makes no sense, with the value; where the wanted
            strategy is impossible, with the numbers.
        K2Error: if the model's files cannot be read.
    """
    _check_request(nodes, strategy, concurrency, dtype)
    known = _read_model(model)
    demand = _Demand(
        _choose_context(context_length, known.config),
        concurrency,
        _choose_dtype(dtype, known, nodes),
    )
    shared = share_machines(nodes)
    chosen, reason = _choose(known, shared, demand, strategy)
    request = PlannedRequest(demand.context_length, concurrency, demand.dtype, chosen.chunk_tokens)
    return Plan(
        model=PlannedModel(
            reference=model,
            parameters=known.facts.parameter_count,
            stored_bytes=known.stored_bytes,
            architecture=str(known.config["model_type"]),
            quantization=describe_quantization(known.config),
        ),
        request=request,
        placement=chosen.placement,
        nodes=chosen.budgets,
        fits=chosen.fits,
        marks=_marks(known, shared),
        reason=reason,
    )


def _check_request(
    nodes: Sequence[NodeMemory], strategy: str, concurrency: int, dtype: str
) -> None:
    if not nodes:
        raise UsageError("a plan needs at least one node", "--hardware '2x m3-ultra-512'")
    for name, value, allowed in (("parallel", strategy, _STRATEGIES), ("dtype", dtype, _DTYPES)):
        if value not in allowed:
            raise UsageError(f"--{name} '{value}' is none of {', '.join(allowed)}")
    if strategy == "single" and len(nodes) > 1:
        raise UsageError(
            f"--parallel single runs on one node, not on {len(nodes)}", "name one node only"
        )
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise UsageError(f"concurrency must be between 1 and {MAX_CONCURRENCY}, not {concurrency}")


def _read_model(reference: str) -> _Model:
    from k2cli.models.checkpoint import read_checkpoint
    from k2cli.models.reference import config_source
    from k2cli.sharding.architectures import model_classes
    from k2cli.sharding.footprint import model_facts

    folder = config_source(reference)
    checkpoint = read_checkpoint(folder)
    config = checkpoint.config
    _, arguments = model_classes(config)
    names = {field.name for field in fields(arguments)} if hasattr(
        arguments, "__dataclass_fields__") else set()  # fmt: skip
    if "text_config" in names:
        names |= {"kv_lora_rank"} & set(config.get("text_config") or {})
    check_config(config, str(folder / "config.json"), frozenset(names))
    stored = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} or None
    facts = model_facts(config, stored)
    if stored is None:
        stored_bytes, mark = stored_bytes_of_config(config, facts.model)
    else:
        stored_bytes, mark = checkpoint.stored_bytes, cast(Mark, "exact")
    shape = activation.activation_shape(config)
    return _Model(reference, config, stored, stored_bytes, mark, facts, shape)


def _choose_context(wanted: int | None, config: Mapping[str, Any]) -> int:
    most = model_context_length(config)
    if wanted is None:
        return min(most or DEFAULT_CONTEXT_LENGTH, DEFAULT_CONTEXT_LENGTH)
    if wanted < 1:
        raise UsageError(f"a context of {wanted} tokens holds nothing", "--context 32768")
    if most is not None and wanted > most:
        raise UsageError(
            f"a context of {wanted:,} tokens is beyond this model's maximum of {most:,}",
            f"--context {most}",
        )
    if wanted > MAX_CONTEXT_LENGTH:
        raise UsageError(f"a context of {wanted:,} tokens is beyond {MAX_CONTEXT_LENGTH:,}")
    return wanted


def _choose_dtype(wanted: str, known: _Model, nodes: Sequence[NodeMemory]) -> str:
    if wanted != "auto":
        return wanted
    if any(node.backend == "cpu" for node in nodes):
        return "float32"
    text = known.config.get("text_config") or {}
    for source in (known.config, text):
        name = source.get("torch_dtype") or source.get("dtype")
        if isinstance(name, str) and name.removeprefix("torch.") in _ITEM_BYTES:
            return name.removeprefix("torch.")
    stored = [dtype for dtype, _ in (known.stored or {}).values() if dtype in _STORED_FLOATS]
    return _STORED_FLOATS[max(set(stored), key=stored.count)] if stored else "bfloat16"


def _marks(known: _Model, nodes: Sequence[NodeMemory]) -> dict[str, Mark]:
    limits: dict[str, Mark] = {"limit": "exact"}
    for node in nodes:
        if node.limit_mark != "exact":
            limits["limit"] = node.limit_mark
    return {
        "parameters": "exact",
        "stored_bytes": known.stored_mark,
        "weights_bytes": "exact",
        "kv_cache_bytes": "exact",
        "activation_bytes": "modelled",
        "overhead_bytes": "assumed",
        "memory_bytes": "exact",
        "limit_bytes": limits["limit"],
    }


# --- choosing a strategy ------------------------------------------------------------------------


def _choose(
    known: _Model, nodes: Sequence[NodeMemory], demand: _Demand, strategy: str
) -> tuple[_Candidate, str]:
    if len(nodes) == 1:
        return _single(known, nodes, demand), "there is one node"
    if strategy == "pipeline":
        return _pipeline(known, nodes, demand), "asked for"
    if strategy == "tensor":
        _refuse_tensor(known, len(nodes))
        return _tensor(known, nodes, demand), "asked for"
    obstacles: list[str] = []
    candidates: list[_Candidate] = []
    for attempt in (_pipeline, _tensor):
        try:
            if attempt is _tensor:
                _refuse_tensor(known, len(nodes))
            candidates.append(attempt(known, nodes, demand))
        except UsageError as error:
            obstacles.append(error.message)
    if not candidates:
        raise UsageError("; ".join(obstacles))
    chosen = max(candidates, key=_preference)
    return chosen, _explain(chosen, candidates, obstacles)


def _preference(candidate: _Candidate) -> tuple[bool, int, int]:
    """Fits first; then a good prefill chunk; then room. A pipeline wins ties: it stands first."""
    chunk = min(candidate.chunk_tokens, _GOOD_CHUNK_TOKENS)
    return candidate.fits, chunk, 0 if candidate.fits else candidate.headroom_bytes


def _explain(chosen: _Candidate, candidates: Sequence[_Candidate], obstacles: Sequence[str]) -> str:
    name = chosen.placement.strategy
    if obstacles:
        return obstacles[0]
    (other,) = (each for each in candidates if each is not chosen)
    rival = other.placement.strategy
    if not chosen.fits:
        return f"neither fits; {name} lacks least"
    if not other.fits:
        return f"{rival} does not fit"
    if _preference(other)[1] < _preference(chosen)[1]:
        return (
            f"it has room for prefill chunks of {chosen.chunk_tokens} tokens, "
            f"{rival} for {other.chunk_tokens}"
        )
    return "a pipeline exchanges least between nodes"


def _refuse_tensor(known: _Model, ranks: int) -> None:
    from k2cli.sharding.footprint import tensor_obstacle

    obstacle = tensor_obstacle(known.config, ranks)
    if obstacle is not None:
        raise UsageError(f"tensor parallelism is not possible: {obstacle}", "--parallel pipeline")


def _single(known: _Model, nodes: Sequence[NodeMemory], demand: _Demand) -> _Candidate:
    return _whole_layers(known, nodes, demand, "single")


def _tensor(known: _Model, nodes: Sequence[NodeMemory], demand: _Demand) -> _Candidate:
    return _whole_layers(known, nodes, demand, "tensor")


def _whole_layers(
    known: _Model, nodes: Sequence[NodeMemory], demand: _Demand, strategy: Strategy
) -> _Candidate:
    count = known.facts.layer_count
    ranks = tuple(RankPlacement(rank, node.name, (0, count)) for rank, node in enumerate(nodes))
    return _traced(known, nodes, demand, Placement(strategy, ranks))


def _pipeline(known: _Model, nodes: Sequence[NodeMemory], demand: _Demand) -> _Candidate:
    """The even split, or the one that fills all stages equally if only that fits."""
    count = known.facts.layer_count
    if count < len(nodes):
        raise UsageError(
            f"a pipeline needs a layer per node: the model has {count} layers, "
            f"there are {len(nodes)} nodes"
        )
    even = _staged(known, nodes, demand, even_split(count, len(nodes)))
    if even.fits and even.chunk_tokens >= min(_GOOD_CHUNK_TOKENS, demand.context_length):
        return even
    ranges = _balanced_ranges(known, nodes, demand, even)
    if ranges is None or ranges == tuple(part.layers for part in even.placement.ranks):
        return even
    return max((even, _staged(known, nodes, demand, ranges)), key=_preference)


def _staged(
    known: _Model,
    nodes: Sequence[NodeMemory],
    demand: _Demand,
    ranges: Sequence[tuple[int, int]],
) -> _Candidate:
    ranks = tuple(
        RankPlacement(rank, node.name, layers)
        for rank, (node, layers) in enumerate(zip(nodes, ranges, strict=True))
    )
    return _traced(known, nodes, demand, Placement("pipeline", ranks))


def _balanced_ranges(
    known: _Model, nodes: Sequence[NodeMemory], demand: _Demand, even: _Candidate
) -> tuple[tuple[int, int], ...] | None:
    from k2cli.sharding.stage import anatomy
    from k2cli.sharding.trace import parameters

    parts = anatomy(known.facts.model)
    weights = [sum(v.nbytes for v in parameters(layer).values()) for layer in parts.layers]
    cache = sum(budget.kv_cache_bytes for budget in even.budgets) // len(weights)
    embeddings = sum(
        sum(v.nbytes for v in parameters(parent[name]).values())
        for parent, name in parts.embeddings
    )
    outputs = sum(
        sum(v.nbytes for v in parameters(parent[name]).values()) for parent, name in parts.outputs
    ) + (embeddings if parts.tied else 0)
    # Room for layers: the limit without what does not depend on where the cut is.
    smallest = _activations(known, nodes, demand, even.placement, PREFILL_CHUNKS[-1])
    capacities = [
        node.limit_bytes - RUNTIME_BYTES - peak for node, peak in zip(nodes, smallest, strict=True)
    ]
    layer_bytes = [size + int(cache * 1.05) for size in weights]
    return balanced_split(layer_bytes, capacities, embeddings, outputs)


# --- the ledger of a placement ------------------------------------------------------------------


def _traced(
    known: _Model, nodes: Sequence[NodeMemory], demand: _Demand, placement: Placement
) -> _Candidate:
    """Trace a placement and give it the largest prefill chunk that has room."""
    from k2cli.sharding.footprint import footprints

    held = footprints(
        known.config,
        placement,
        context_length=demand.context_length,
        concurrency=demand.concurrency,
        stored=known.stored,
        dtype=demand.dtype,
    )
    useful = [chunk for chunk in PREFILL_CHUNKS if chunk <= demand.context_length]
    for chunk in useful or PREFILL_CHUNKS[-1:]:
        candidate = _budgeted(known, nodes, demand, placement, held, chunk)
        if candidate.fits:
            break
    return candidate


def _budgeted(
    known: _Model,
    nodes: Sequence[NodeMemory],
    demand: _Demand,
    placement: Placement,
    held: Sequence[RankFootprint],
    chunk: int,
) -> _Candidate:
    peaks = _activations(known, nodes, demand, placement, chunk)
    budgets = tuple(
        node_budget(
            node,
            weights_bytes=rank.weights_bytes,
            kv_cache_bytes=rank.kv_cache_bytes,
            activation_bytes=peak,
            layers=part.layers[1] - part.layers[0],
        )
        for node, rank, part, peak in zip(nodes, held, placement.ranks, peaks, strict=True)
    )
    return _Candidate(placement, chunk, budgets)


def _activations(
    known: _Model,
    nodes: Sequence[NodeMemory],
    demand: _Demand,
    placement: Placement,
    chunk: int,
) -> list[int]:
    slices = placement.size if placement.strategy == "tensor" else 1
    return [
        activation.activation_demand(
            known.shape,
            backend=node.backend,
            chunk_tokens=chunk,
            context_length=demand.context_length,
            concurrency=demand.concurrency,
            itemsize=_ITEM_BYTES[demand.dtype],
            slices=slices,
            samples=part.layers[1] == placement.layer_count,
        ).peak_bytes
        for node, part in zip(nodes, placement.ranks, strict=True)
    ]
