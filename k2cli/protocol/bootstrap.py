"""The instructions for a guard: its rank's part of the plan, time limits, the API."""

from __future__ import annotations

from typing import Literal

import msgspec

from k2cli.choices import FloatType, HeadPlacement, KvBits, Speculation, Strategy, Transport
from k2cli.gpu_name import GpuName
from k2cli.protocol.access import NamedKey


class Deadlines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Time limits in seconds after which a silent process counts as dead.

    Those ending in ``stall`` are for a rank that completes no step: ``guard.watchdog`` says which
    applies when. ``work_stall`` is for one that completes none although it is at work, such as
    compiling or reading, and ``work_interval`` how often a guard looks for that.
    """

    heartbeat_interval: float = 1.0
    liveness: float = 8.0
    initialisation: float = 60.0
    load_stall: float = 120.0
    warmup_stall: float = 60.0
    step_stall: float = 10.0
    peer_stall: float = 90.0
    work_stall: float = 600.0
    work_interval: float = 1.0
    stopped: float = 8.0
    stop_grace: float = 3.0


class HttpEndpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The address of the API on the leader's guard. ``api_key`` None means that no key is needed.

    ``next_port_will_do``: the user named no port, so a later one is used if this one is taken.
    ``allowed_hosts``, ``cors_origins``, ``aliases`` and ``normalizes_prompts`` are those of
    ``server.served_model.ServedModel``. ``tool_parser`` and ``reasoning_parser`` None leave the
    choice to the model's chat template. ``keys`` are accepted beside ``api_key``, which is set if
    there can be any. ``tls_certificate`` and ``tls_key`` are paths on the leader's node.
    """

    host: str
    port: int
    api_key: str | None = None
    next_port_will_do: bool = False
    allowed_hosts: list[str] = []
    cors_origins: list[str] = []
    aliases: list[str] = []
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    normalizes_prompts: bool = True
    keys: list[NamedKey] = []
    shares_prefixes: bool = False
    tls_certificate: str | None = None
    tls_key: str | None = None


class LinkCheck(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The prompts of the link check, shortest first, each computed twice before the run is ready.

    ``seconds`` is the time after which a prompt is cut short, so that a slow machine is ready in
    about that time; 0 sets no limit.
    """

    tokens: list[int]
    seconds: float = 0.0


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of the plan that one rank carries out.

    * ``layers[r]``: rank r's half-open range of decoder layers.
    * ``dtype``: ``checkpoint``, or the float type that weights are cast to.
    * ``expected_weights_bytes[r]``, ``expected_cache_bytes[r]`` (if known): the planned sizes of
      rank r's weights and caches; loading fails if a size differs.
    * ``cache_limit_bytes``: limit of the freed arrays that MLX keeps; ``memory_limit_bytes``: of
      these and those in use together.
    * ``nccl_coordinator`` (``host:port``): where the leader hands out NCCL's unique id; NCCL itself
      listens on ``nccl_interface`` alone.
    * ``looks_ahead``, ``joins_projections``: None leaves the choice to ``rank.engine.lookahead``
      and ``rank.joined_projections``.
    * ``expansion_weight``, ``attention_block_tokens``: settings of ``rank.attention.latent``, equal
      on all ranks.
    * ``meets``: tensor ranks wait for each other with the processor before a step of several tokens
      or of a new shape, because a GPU of one of them must not wait long.
    * ``link_check``: None leaves that check out.
    * ``prefix_disk_bytes``: what the prefix cache may take on this rank's disk, 0 for none;
      ``prefix_disk_scope``, on the leader only: whose prompts the scope "" has, a digest of the
      run's own key.
    * ``speculation``: when the leader lets steps verify drafts (``rank.engine.speculation``).
    * ``kv_bits``: bits of quantized KV caches, 0 if they are not quantized.
    """

    run_id: str
    rank: int
    size: int
    nodes: list[str]
    transport: Transport
    model_path: str
    strategy: Strategy
    layers: list[tuple[int, int]]
    dtype: FloatType | Literal["checkpoint"]
    context_length: int
    concurrency: int
    prefill_chunk_tokens: int
    expected_weights_bytes: list[int]
    expected_cache_bytes: list[int] = msgspec.field(default_factory=list)
    head: HeadPlacement = "replicated"
    ring_hosts: list[list[str]] | None = None
    wired_limit_bytes: int | None = None
    cache_limit_bytes: int | None = None
    memory_limit_bytes: int | None = None
    jaccl_devices: list[list[str | list[str] | None]] | None = None
    jaccl_coordinator: str | None = None
    nccl_coordinator: str | None = None
    nccl_interface: str | None = None
    looks_ahead: bool | None = None
    expansion_weight: float = 1.0
    attention_block_tokens: int = 0
    meets: bool = False
    link_check: LinkCheck | None = None
    prefix_disk_bytes: int = 0
    prefix_disk_scope: str = ""
    joins_projections: bool | None = None
    speculation: Speculation = "auto"
    kv_bits: KvBits = 0


class PlannedRank(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Memory that the plan gives to one rank, in bytes, and the device of the rank.

    ``device`` is a ``choices.Device``, and ``gpu`` describes the NVIDIA GPU of the rank; both are
    empty if they are not known.
    """

    total_bytes: int
    limit_bytes: int
    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    activation_bytes: int = 0
    overhead_bytes: int = 0
    device: str = ""
    gpu: str = ""


class PlannedRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decisions of the launch about a run, for reports only: no rank computes by them.

    ``interfaces`` are those of the nodes by which the ranks reach each other, in words.
    """

    ranks: list[PlannedRank]
    transport_reason: str = ""
    interfaces: list[str] = []


class Bootstrap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file that the launcher leaves for a guard (mode 0600; the guard deletes it).

    ``gpu`` is the GPU that the rank gets, None if it may use whatever MLX finds.
    ``secret`` (hex) authenticates every TCP connection of the run. ``http`` is set for rank 0
    only. ``environment`` is added to the rank's environment.

    ``restarts``: after a failure the leader's guard stays, answers 503, and waits for a
    ``NextAttempt``. ``hold`` is the cause of the last failure, for a fresh guard that begins there.
    ``attempt`` counts the starts of the run from 1. ``planned`` is set for rank 0 only.
    """

    assignment: Assignment
    secret: str
    liveness_host: str
    liveness_port: int
    model_name: str
    http: HttpEndpoint | None = None
    environment: dict[str, str] = {}
    gpu: GpuName | None = None
    deadlines: Deadlines = Deadlines()
    restarts: bool = False
    hold: str | None = None
    attempt: int = 1
    planned: PlannedRun | None = None
