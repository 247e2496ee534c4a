"""The plan: placement, byte budget per node and request, as a JSON document that is a contract.

``plan-memory`` prints it, ``launch`` carries it out. docs/reference/contracts.md describes the
fields; a field may be added, but none is renamed without a new ``SCHEMA_VERSION``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from k2cli.choices import Certainty, FloatType, KvBits
from k2cli.errors import UsageError
from k2cli.files import decode_json, encode_json, read_regular, unwritable, write_atomically
from k2cli.gpu_name import GpuName
from k2cli.models.json_files import shown
from k2cli.planning.speed.estimate import SpeedEstimate
from k2cli.planning.speed.exchange import ANSWER_TOKENS, PROMPT_TOKENS
from k2cli.sharding.placement import Placement

SCHEMA_VERSION = 1
LIMIT_BYTES = 32 * 2**20
"""The largest plan that is read."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The planned model. ``stored_bytes`` is the size of the checkpoint as stored on disk or Hub.

    ``quantize`` is the recipe by which it is yet to be quantized, empty if it is planned unchanged.
    ``context_length`` is the most tokens that its config supports, 0 if it gives no number.
    """

    reference: str
    parameters: int
    stored_bytes: int
    architecture: str = ""
    quantization: str = ""
    quantize: str = ""
    context_length: int = 0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """The request that the plan has memory for. ``dtype`` is that of activations and KV cache.

    Placements were compared by a prompt of ``prompt_tokens`` with an answer of ``answer_tokens``.
    With ``attention_block_tokens`` latent attention to a prompt is computed in blocks of so many
    tokens of its context. ``kv_bits`` are those of quantized keys and values, 0 if they are not
    quantized.
    """

    context_length: int
    concurrency: int
    dtype: FloatType = "bfloat16"
    prefill_chunk_tokens: int = 512
    prompt_tokens: int = PROMPT_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    attention_block_tokens: int = 0
    kv_bits: KvBits = 0


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The items of a ledger, in bytes.

    Weights are those of layers and of edges (embedding, norm and head); activation is the larger
    of prefill and decode; overhead is communication, runtime, slack and cache growth together.
    ``os_reserve_bytes`` is memory that the limit leaves to the operating system.
    """

    layer_weights_bytes: int
    edge_weights_bytes: int
    prefill_activation_bytes: int
    decode_activation_bytes: int
    communication_bytes: int
    runtime_bytes: int
    allocator_slack_bytes: int
    cache_growth_bytes: int
    os_reserve_bytes: int


@dataclass(frozen=True, slots=True)
class NodeBudget:
    """The ledger of one rank's machine, in bytes. ``weights_bytes`` is in memory, not on disk.

    ``backend`` is the machine's ``Device``; ``limit_source`` is the source of the limit. On a
    machine with GPUs, memory and limit are those of ``gpu``, the rank's own.
    """

    name: str
    memory_bytes: int
    limit_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    overhead_bytes: int
    total_bytes: int
    headroom_bytes: int
    backend: str = ""
    limit_source: str = ""
    breakdown: Breakdown | None = None
    gpu: GpuName | None = None

    @property
    def place(self) -> str:
        """The machine, with the number of the rank's GPU if it has one."""
        return self.name if self.gpu is None else f"{self.name} {self.gpu.short}"


@dataclass(frozen=True, slots=True)
class Alternative:
    """A placement that was compared, possible or not.

    ``headroom_bytes`` is that of its tightest node. Speeds are expected tokens per second, None if
    they cannot be predicted. ``verdict`` gives the reason for the choice in a few words.
    """

    name: str
    possible: bool
    fits: bool
    chosen: bool
    verdict: str
    prefill_chunk_tokens: int = 0
    headroom_bytes: int = 0
    decode_tokens_per_second: float | None = None
    prefill_tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """One change that makes the plan fit; it was planned, and leaves ``headroom_bytes``.

    ``options`` are the flags of ``plan-memory`` that make the change, in place of those given.
    ``command`` must be run on the machines themselves.
    """

    kind: str
    change: str
    options: dict[str, str]
    headroom_bytes: int
    decode_tokens_per_second: float | None = None
    command: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan that ``plan-memory`` shows and ``launch`` carries out.

    ``reason`` explains the strategy in one sentence. ``max_context_length`` is for the requested
    concurrency, ``max_concurrency`` for the requested context, each with the prefill chunk as small
    as necessary; 0 if nothing fits.
    """

    model: PlannedModel
    request: PlannedRequest
    placement: Placement
    nodes: tuple[NodeBudget, ...]
    fits: bool
    max_context_length: int = 0
    max_concurrency: int = 0
    speed: SpeedEstimate | None = None
    speed_note: str = ""
    marks: dict[str, Certainty] = field(default_factory=dict)
    advice: tuple[Advice, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    reason: str = ""
    schema_version: int = SCHEMA_VERSION


def plan_to_json(plan: Plan) -> bytes:
    """Encode the plan as one JSON document, indented, with a final newline."""
    return encode_json(plan)


def save_plan(plan: Plan, path: Path) -> None:
    """Write the plan to a file atomically.

    Raises:
        UsageError: if the file cannot be written.
    """
    try:
        write_atomically(path, plan_to_json(plan))
    except OSError as error:
        raise unwritable(error, path, UsageError) from error


def plan_from_json(document: bytes, source: str) -> Plan:
    """Read a plan that ``plan-memory --save`` or ``--json`` wrote.

    Raises:
        UsageError: if it is not JSON, a field is missing or of the wrong type, the placement is
            inconsistent, or its schema version is another. The message names ``source``.
    """
    hint = "k2 plan-memory MODEL --hardware SPEC --save plan.json"
    try:
        fields: dict[str, Any] = decode_json(document, type=dict[str, Any])
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{source} has schema_version {version!r}, this k2 reads {SCHEMA_VERSION}", hint
            )
        return _with_possible_sizes(msgspec.convert(fields, Plan))
    except (msgspec.DecodeError, ValueError) as error:
        raise UsageError(f"{source} is not a plan: {error}", hint) from error


def _with_possible_sizes(plan: Plan) -> Plan:
    """Return a plan whose sizes ranks can work with.

    Raises:
        ValueError: if one is negative or too large.
    """
    counts = {
        "context_length": plan.request.context_length,
        "concurrency": plan.request.concurrency,
        "prefill_chunk_tokens": plan.request.prefill_chunk_tokens,
    }
    for name, count in counts.items():
        if not 0 < count < 2**31:
            raise ValueError(f"{name} cannot be {shown(count)}")
    if not 0 <= (block := plan.request.attention_block_tokens) < 2**31:
        raise ValueError(f"attention_block_tokens cannot be {shown(block)}")
    for node in plan.nodes:
        for name in ("weights_bytes", "kv_cache_bytes", "overhead_bytes", "limit_bytes"):
            size = getattr(node, name)
            if not 0 <= size < 2**62:
                raise ValueError(f"{name} of {node.name} cannot be {shown(size)}")
    return plan


def read_plan(path: Path) -> Plan:
    """Read the plan in a file.

    Raises:
        UsageError: if the file cannot be read, or is not a plan.
    """
    try:
        return plan_from_json(read_regular(path, LIMIT_BYTES, follow_links=True), str(path))
    except OSError as error:
        raise UsageError(
            f"plan '{path}' cannot be read: {error.strerror}", "k2 plan-memory MODEL --save FILE"
        ) from error
