"""All messages that supervisor, guards and ranks exchange.

There are four conversations, each with its own union of message types:

* ``supervisor``: supervisor <-> leader's guard (``SupervisorMessage`` down, ``RunEvent`` up): JSON
  lines over the guard's stdin and stdout, which ssh carries from another node;
* ``liveness``: leader's guard <-> a follower's guard (``LivenessMessage``): TCP, authenticated;
* ``rank``: a guard <-> its rank (``GuardMessage`` down, ``RankMessage`` up): an inherited socket
  pair. The requests among them are in ``requests``;
* ``decisions``: leader rank <-> a follower rank (``Decision`` out, ``FollowerMessage`` back): TCP,
  authenticated. Every decision carries the step that it applies to.

``bootstrap`` is the file that a guard starts from. Other folders import all names from here.

Messages are msgspec structs: decoding checks the schema, unknown fields are refused, and nothing
is ever unpickled. Framing and authentication are in ``protocol.wire``.
"""

from __future__ import annotations

from k2cli.protocol.access import KeyLimits, NamedKey, NamedKeys
from k2cli.protocol.bootstrap import (
    Assignment,
    Bootstrap,
    Deadlines,
    HttpEndpoint,
    PlannedRank,
    PlannedRun,
)
from k2cli.protocol.decisions import (
    CloseSequence,
    CutBack,
    Decision,
    Decode,
    DropPrefix,
    FollowerMessage,
    HeldTensor,
    Hello,
    Holdings,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    Prefill,
    PrefillTogether,
    Quit,
    StepDigest,
    Tick,
    Warm,
    WarmUp,
)
from k2cli.protocol.liveness import (
    ControlEndpoint,
    LivenessMessage,
    RankStatus,
    RunActivity,
)
from k2cli.protocol.message import (
    Heartbeat,
    Message,
)
from k2cli.protocol.rank import (
    ControlListening,
    EngineReady,
    Fatal,
    GuardMessage,
    KvCacheUse,
    RankMessage,
    Shutdown,
    Start,
)
from k2cli.protocol.requests import (
    Cancel,
    Finished,
    FinishReason,
    Generate,
    Grammar,
    Paused,
    PromptProgress,
    RequestFailed,
    Sampling,
    TokenLogprob,
    Tokens,
    WaitingOrder,
)
from k2cli.protocol.supervisor import (
    GuardStarted,
    LoadProgress,
    LogLine,
    NextAttempt,
    RankFailed,
    RankReady,
    RunEnded,
    RunEvent,
    RunReady,
    RunRestarting,
    StopRun,
    SupervisorMessage,
    TlsCertificate,
)

__all__ = [
    "Assignment",
    "Bootstrap",
    "Cancel",
    "CloseSequence",
    "ControlEndpoint",
    "ControlListening",
    "CutBack",
    "Deadlines",
    "Decision",
    "Decode",
    "DropPrefix",
    "EngineReady",
    "Fatal",
    "FinishReason",
    "Finished",
    "FollowerMessage",
    "Generate",
    "Grammar",
    "GuardMessage",
    "GuardStarted",
    "Heartbeat",
    "HeldTensor",
    "Hello",
    "Holdings",
    "HttpEndpoint",
    "JoinBatch",
    "KeyLimits",
    "KvCacheUse",
    "LeaveBatch",
    "LivenessMessage",
    "LoadProgress",
    "LogLine",
    "Message",
    "NamedKey",
    "NamedKeys",
    "NextAttempt",
    "OpenSequence",
    "Paused",
    "PlannedRank",
    "PlannedRun",
    "Prefill",
    "PrefillTogether",
    "PromptProgress",
    "Quit",
    "RankFailed",
    "RankMessage",
    "RankReady",
    "RankStatus",
    "RequestFailed",
    "RunActivity",
    "RunEnded",
    "RunEvent",
    "RunReady",
    "RunRestarting",
    "Sampling",
    "Shutdown",
    "Start",
    "StepDigest",
    "StopRun",
    "SupervisorMessage",
    "Tick",
    "TlsCertificate",
    "TokenLogprob",
    "Tokens",
    "WaitingOrder",
    "Warm",
    "WarmUp",
]
