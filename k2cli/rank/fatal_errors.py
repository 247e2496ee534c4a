"""The last message of a rank: the error that ends it, in words, and if it is likely a symptom.

MLX has no types of errors. Its messages are known from its source (0.32.4): ``[metal::malloc]``,
``[jaccl]``, ``[ring]``, and ``[METAL] Command buffer execution failed:`` with the words of macOS,
which name the cause by a constant. Sources: ml-explore/mlx#479 (memory), mlx-examples#1185 (a GPU
waits for another rank for some five seconds at most), mlx#3267 (the display), mlx#3224.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Literal

from k2cli.errors import K2Error
from k2cli.protocol import Assignment, Fatal
from k2cli.protocol.wire import ConnectionLost

Kind = Literal["memory", "lost peer", "internal"]


@dataclass(frozen=True, slots=True)
class _Known:
    """A phrase of an error, in small letters, and what it means for this rank.

    ``{node}`` in ``hint`` is the rank's node. ``shared_words`` are for a rank that adds up sums
    with others, if one of those has likely caused it.
    """

    phrase: str
    kind: Kind
    words: str = ""
    hint: str = ""
    shared_words: str = ""


_COMMAND_BUFFER = "kiogpucommandbuffercallbackerror"
_LESS = "plan for less: k2 plan-memory MODEL --context N"
_KNOWN = (
    _Known(
        f"{_COMMAND_BUFFER}outofmemory",
        "memory",
        "the GPU found no memory for its work",
        f"close what else uses memory on {{node}}, or {_LESS}",
    ),
    _Known(
        f"{_COMMAND_BUFFER}timeout",
        "internal",
        "macOS ended work of the GPU that took longer than some 5 s",
        "plan smaller chunks of prompts: k2 plan-memory MODEL --chunk 512 --save FILE",
        "macOS ended work of the GPU that waited some 5 s, most likely for another rank",
    ),
    _Known(
        f"{_COMMAND_BUFFER}impactinginteractivity",
        "internal",
        "macOS ended work of the GPU because the display waited for it",
        "turn the display off: ssh {node} pmset displaysleepnow",
    ),
    _Known(
        f"{_COMMAND_BUFFER}innocentvictim",
        "lost peer",
        "macOS restarted the GPU because of another process",
    ),
    _Known(
        f"{_COMMAND_BUFFER}submissionsignored",
        "internal",
        "macOS takes no more work for the GPU from this process after earlier errors",
    ),
    _Known("attempting to allocate", "memory"),
    _Known("[metal::malloc] resource limit", "memory"),
    _Known("unable to allocate", "memory"),
    _Known("out of memory", "memory"),
    _Known("insufficient memory", "memory"),
    _Known("bad_alloc", "memory"),
    _Known("connection to a peer", "lost peer"),
    _Known("[ring]", "lost peer"),
    _Known("[jaccl]", "lost peer"),
    _Known("[nccl]", "lost peer"),
)


def fatal(error: BaseException, assignment: Assignment | None) -> Fatal:
    """Build the last message of a rank from the error that ends it.

    Args:
        assignment: None if the error came before it.
    """
    if isinstance(error, K2Error):
        return Fatal(f"{error.message} ({error.hint})" if error.hint else error.message)
    if isinstance(error, ConnectionLost):
        return Fatal(f"lost a control connection: {error}", kind="lost peer")
    text = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, MemoryError):
        return Fatal(text, trace, "memory")
    known = next((each for each in _KNOWN if each.phrase in text.lower()), None)
    if known is None:
        return Fatal(text, trace)
    words, kind, hint = known.words, known.kind, known.hint
    if known.shared_words and assignment is not None and _has_sums(assignment):
        words, kind, hint = known.shared_words, "lost peer", ""
    if words:
        text = f"{words}: {text}"
    if hint:
        node = assignment.nodes[assignment.rank] if assignment is not None else "localhost"
        text += f" ({hint.format(node=node)})"
    return Fatal(text, trace, kind)


def _has_sums(assignment: Assignment) -> bool:
    return assignment.size > 1 and assignment.strategy == "tensor"
