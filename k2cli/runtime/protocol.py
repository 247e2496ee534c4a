"""Every message that launcher, guards and ranks exchange, and nothing else.

Four conversations, each with its own union of message types:

* launcher <-> leader's guard (``LauncherMessage`` down, ``RunEvent`` up): JSON lines over the
  guard's stdin and stdout, which ssh or mpirun carries;
* leader's guard <-> a follower's guard (``LivenessMessage``): TCP, authenticated;
* a guard <-> its rank (``GuardMessage`` down, ``RankMessage`` up): an inherited socket pair;
* leader rank <-> a follower rank (``Decision`` out, ``FollowerMessage`` back): TCP,
  authenticated. Every decision carries the step that it applies to.

Messages are msgspec structs: decoding checks the schema, unknown fields are refused, and nothing
is ever unpickled. Framing and authentication are in ``runtime.wire``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled"]


class Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages; the class name is the value of ``type``."""


# --- what a guard is told before it starts ------------------------------------------------------


class Deadlines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Time limits in seconds after which something silent is taken for dead."""

    heartbeat_interval: float = 1.0
    liveness: float = 8.0
    initialisation: float = 60.0
    load_stall: float = 120.0
    warmup_stall: float = 600.0
    step_stall: float = 10.0
    peer_stall: float = 60.0
    stopped: float = 8.0
    stop_grace: float = 3.0


class HttpEndpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the leader's guard serves the API. ``api_key`` None means no key is asked for.

    ``next_port_will_do``: the user named no port, so one that was taken meanwhile is passed over.
    """

    host: str
    port: int
    api_key: str | None = None
    next_port_will_do: bool = False


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank is to be: the part of the plan that concerns the ranks.

    ``layers[r]`` is rank r's half-open range of decoder layers. ``dtype`` is ``checkpoint`` or
    the name of the float type that weights are cast to. ``expected_weights_bytes[r]`` is what the
    plan says that rank r holds; loading fails if it holds anything else. ``looks_ahead`` is None
    where ``runtime.lookahead`` is to decide.
    """

    run_id: str
    rank: int
    size: int
    nodes: list[str]
    backend: Literal["local", "mpi", "ring", "jaccl"]
    model_path: str
    strategy: Literal["single", "pipeline", "tensor"]
    layers: list[tuple[int, int]]
    dtype: Literal["checkpoint", "float32", "bfloat16", "float16"]
    context_length: int
    concurrency: int
    prefill_chunk_tokens: int
    expected_weights_bytes: list[int]
    head: Literal["replicated", "sharded"] = "replicated"
    ring_hosts: list[list[str]] | None = None
    wired_limit_bytes: int | None = None
    cache_limit_bytes: int | None = None
    jaccl_devices: list[list[str | list[str] | None]] | None = None
    jaccl_coordinator: str | None = None
    looks_ahead: bool | None = None


class Bootstrap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file that the launcher leaves for a guard (mode 0600; the guard deletes it).

    ``secret`` (hex) authenticates every TCP connection of the run. ``http`` is set for rank 0
    only. ``environment`` is added to the rank's environment. ``scratch_directory`` is a folder on
    the leader's node that the leader's guard removes last, in case the launcher no longer can.

    ``restarts``: after a failure the leader's guard stays, answers 503, and waits for a
    ``NextAttempt``. ``hold`` is the cause of the last failure, for a fresh guard that begins there.
    """

    assignment: Assignment
    secret: str
    liveness_host: str
    liveness_port: int
    model_name: str
    http: HttpEndpoint | None = None
    environment: dict[str, str] = {}
    deadlines: Deadlines = Deadlines()
    scratch_directory: str | None = None
    restarts: bool = False
    hold: str | None = None


# --- launcher -> leader's guard -----------------------------------------------------------------


class Heartbeat(Message, tag=True, frozen=True):
    """I am alive. Also travels between guards, and from a guard to its rank."""


class StopRun(Message, tag=True, frozen=True):
    """End the run. ``cause`` is shown to clients whose request it breaks off.

    ``failed`` True: something is broken, so ranks are ended without the polite part; a guard of a
    run that ``restarts`` then stays for the next attempt.
    """

    cause: str
    failed: bool = False


class NextAttempt(Message, tag=True, frozen=True):
    """Begin again after a failure, with what the bootstrap says; the API's port stays."""

    bootstrap: Bootstrap


LauncherMessage = Heartbeat | StopRun | NextAttempt


# --- leader's guard -> launcher (followers' events are passed on by the leader's guard) ----------


class GuardStarted(Message, tag=True, frozen=True):
    """A guard is connected and has started its rank."""

    rank: int
    node: str
    guard_pid: int
    rank_pid: int


class LoadProgress(Message, tag=True, frozen=True):
    """Bytes of its own weights that a rank has loaded so far."""

    rank: int
    phase: Literal["initialising", "loading", "checking", "warming up"]
    done_bytes: int = 0
    total_bytes: int = 0


class RankReady(Message, tag=True, frozen=True):
    """A rank has loaded, and proven, its part. All in bytes, measured by the rank.

    ``bytes_read`` is what it asked of the checkpoint's files, beside their headers.
    """

    rank: int
    weights_bytes: int
    active_memory_bytes: int
    peak_memory_bytes: int
    load_seconds: float
    bytes_read: int = 0


class RunReady(Message, tag=True, frozen=True):
    """Coverage and canary passed on all ranks, and the API answers."""

    url: str


class LogLine(Message, tag=True, frozen=True):
    """One line that a rank or its guard wrote."""

    rank: int
    node: str
    source: Literal["rank", "guard"]
    text: str


class RankFailed(Message, tag=True, frozen=True):
    """A rank is gone or was ended. ``exit_status`` is negative for a signal, as in subprocess.

    ``cause`` is one sentence for the user. The first such event of a run is the root cause.
    """

    rank: int
    node: str
    cause: str
    exit_status: int | None = None
    last_lines: list[str] = []


class RunEnded(Message, tag=True, frozen=True):
    """The last event: all ranks are gone. ``failed`` False after a StopRun."""

    cause: str
    failed: bool


class RunRestarting(Message, tag=True, frozen=True):
    """Written by the supervisor: attempt ``attempt`` begins in ``delay_seconds``."""

    cause: str
    attempt: int
    delay_seconds: float


RunEvent = (
    Heartbeat
    | GuardStarted
    | LoadProgress
    | RankReady
    | RunReady
    | LogLine
    | RankFailed
    | RunEnded
    | RunRestarting
)


# --- between guards -----------------------------------------------------------------------------


class ControlEndpoint(Message, tag=True, frozen=True):
    """Where the leader rank waits for its followers' control connections."""

    host: str
    port: int


class RankStatus(Message, tag=True, frozen=True):
    """A follower's watchdog view, once a second: steps done and what its rank is doing."""

    rank: int
    steps: int
    phase: str


LivenessMessage = (
    Heartbeat
    | StopRun
    | ControlEndpoint
    | RankStatus
    | GuardStarted
    | LoadProgress
    | RankReady
    | LogLine
    | RankFailed
)


# --- guard -> rank ------------------------------------------------------------------------------


class Start(Message, tag=True, frozen=True):
    """First message to a rank. ``secret`` (hex) is for the control connections."""

    assignment: Assignment
    secret: str
    deadlines: Deadlines
    control_host: str


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None


class Generate(Message, tag=True, frozen=True):
    """A validated request for the leader rank. ``stop_tokens`` end it and are not returned."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: list[int] = []
    use_prefix_cache: bool = True


class Cancel(Message, tag=True, frozen=True):
    """Nobody wants the rest of this request."""

    request_id: str


class Shutdown(Message, tag=True, frozen=True):
    """End in good order, at once."""


GuardMessage = Start | ControlEndpoint | Generate | Cancel | Shutdown | Heartbeat


# --- rank -> guard ------------------------------------------------------------------------------


class ControlListening(Message, tag=True, frozen=True):
    """The leader rank has bound its control port."""

    port: int


class PromptProgress(Message, tag=True, frozen=True):
    """Prompt tokens computed so far. ``cached`` of them were reused."""

    request_id: str
    done: int
    total: int
    cached: int = 0


class TokenLogprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Natural-log probability of the chosen token and of the best alternatives."""

    logprob: float
    top: list[tuple[int, float]] = []


class Tokens(Message, tag=True, frozen=True):
    """Newly generated token ids, in order; ``logprobs`` is as long, or empty if not asked for."""

    request_id: str
    tokens: list[int]
    logprobs: list[TokenLogprob] = []


class Finished(Message, tag=True, frozen=True):
    """The request is over. Durations in seconds; prefill includes the first token."""

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


class RequestFailed(Message, tag=True, frozen=True):
    """The request ended by an error of its own; the engine goes on."""

    request_id: str
    error: str
    kind: Literal["invalid", "capacity", "internal"] = "internal"


class Fatal(Message, tag=True, frozen=True):
    """The rank is about to exit because of this."""

    error: str
    traceback: str = ""
    kind: Literal["memory", "lost peer", "internal"] = "internal"


class EngineReady(Message, tag=True, frozen=True):
    """Leader rank only: every rank has proven its part; requests are welcome."""


RankMessage = (
    LoadProgress
    | RankReady
    | ControlListening
    | EngineReady
    | PromptProgress
    | Tokens
    | Finished
    | RequestFailed
    | Fatal
)


# --- leader rank -> follower rank ---------------------------------------------------------------


class OpenSequence(Message, tag=True, frozen=True):
    """Make a KV cache for a sequence: empty, or the first tokens of a kept prefix."""

    step: int
    sequence: int
    prefix: int | None = None
    kept_tokens: int = 0


class Prefill(Message, tag=True, frozen=True):
    """Compute a chunk of a sequence's prompt; only its KV cache matters."""

    step: int
    sequence: int
    tokens: list[int]


class PrefillTogether(Message, tag=True, frozen=True):
    """Compute several whole prompts at once, and make their sequences rows of a decode batch.

    ``tokens[i]`` is the prompt of ``sequences[i]`` without its last token; none is empty, and the
    sequences are fresh.
    """

    step: int
    batch: int
    sequences: list[int]
    tokens: list[list[int]]


class JoinBatch(Message, tag=True, frozen=True):
    """Make a sequence the last row of a decode batch, which is made if there is none."""

    step: int
    batch: int
    sequence: int


class Decode(Message, tag=True, frozen=True):
    """Compute one token per row of a batch, and the logits after it.

    ``tokens`` are the inputs, one per row. With ``ahead`` it is empty: the inputs are what the
    leader chooses in this batch's step before, which is still being computed, and they come over
    the MLX group; ``told`` of a later decision says which they were (-1: nothing to tell).
    ``digest`` asks for digests of what the rank computed (the canary), ``state_digest`` for one
    of what it holds (the periodic check).
    """

    step: int
    batch: int
    tokens: list[int]
    digest: bool = False
    state_digest: bool = False
    ahead: bool = False
    told: list[int] = []


class LeaveBatch(Message, tag=True, frozen=True):
    """Take a sequence out of a batch: into another batch, or for good.

    ``keep_as`` keeps its KV cache as a prefix of that id. ``told`` is the input of its last step
    if that was decided ahead, else -1.
    """

    step: int
    batch: int
    sequence: int
    keep_as: int | None = None
    move_to: int | None = None
    told: int = -1


class CloseSequence(Message, tag=True, frozen=True):
    """Drop the KV cache of a sequence in prefill, or keep it as a prefix."""

    step: int
    sequence: int
    keep_as: int | None = None


class DropPrefix(Message, tag=True, frozen=True):
    """Forget a kept prefix."""

    step: int
    prefix: int


class Tick(Message, tag=True, frozen=True):
    """Nothing to do; proves that leader and connection live."""

    step: int


class Quit(Message, tag=True, frozen=True):
    """The leader ends in good order."""

    step: int


Decision = (
    OpenSequence
    | Prefill
    | PrefillTogether
    | JoinBatch
    | Decode
    | LeaveBatch
    | CloseSequence
    | DropPrefix
    | Tick
    | Quit
)


# --- follower rank -> leader rank ---------------------------------------------------------------


class HeldTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that a rank holds: its name in the model, shape on this rank, dtype and bytes."""

    name: str
    shape: list[int]
    dtype: str
    nbytes: int


class Hello(Message, tag=True, frozen=True):
    """First message on a control connection: which follower this is."""

    rank: int


class Holdings(Message, tag=True, frozen=True):
    """Everything that a rank has loaded and evaluated: its part of the coverage proof."""

    rank: int
    tensors: list[HeldTensor]


class StepDigest(Message, tag=True, frozen=True):
    """Digests (hex) of what a rank was handed in a step and of what it computed.

    In a pipeline that is the hidden states that arrived and departed; in tensor parallelism
    nothing arrives, and the digest is of the chosen token. ``state`` is of ids, rows and steps:
    what the rank believes to hold. Fields that were not asked for are empty.
    """

    rank: int
    step: int
    arrived: str = ""
    computed: str = ""
    state: str = ""


class FollowerFailed(Message, tag=True, frozen=True):
    """A follower cannot go on."""

    rank: int
    error: str


FollowerMessage = Hello | Holdings | StepDigest | FollowerFailed | Heartbeat
