"""Error tree of k2: raised where a failure is detected, caught once in ``k2cli.cli.main``.

K2Error                 1   the work failed
├── UsageError          2   the command line, or a file named on it, is wrong
├── DoesNotFitError     3   the model does not fit in memory
├── NotAuthorisedError  4   a Hub or an API refused the credentials
├── ClusterError        5   a node or a rank failed
│   └── NodeAccessError 4   ssh refused the credentials for a node
└── InternalError      70   a bug in k2

Exit status 130 (interrupted) has no class; Python's KeyboardInterrupt stands for it.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_INTERRUPTED = 130
MAX_MESSAGE_LETTERS = 3000
_LAST_LETTERS = 1000


class K2Error(Exception):
    """A failure to show to the user, with a hint at the remedy.

    Args:
        message: one sentence without a full stop that quotes the wrong value.
        hint: a command to copy or a thing to change, printed after ``hint:``.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        # A wrong value that it quotes may be megabytes. What is wrong is said before or after it.
        if len(message) > MAX_MESSAGE_LETTERS:
            first = message[: MAX_MESSAGE_LETTERS - _LAST_LETTERS]
            message = f"{first} ... {message[-_LAST_LETTERS:]}"
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(K2Error):
    """The command line, or a file named on it, is wrong."""

    exit_code = 2


class DoesNotFitError(K2Error):
    """The model, its cache or a request needs more memory than the nodes have."""

    exit_code = 3


class NotAuthorisedError(K2Error):
    """A Hub or an HTTP API refused the credentials, or requires some."""

    exit_code = 4


class ClusterError(K2Error):
    """A node could not be reached, or a rank or guard failed."""

    exit_code = 5


class NodeAccessError(ClusterError):
    """A node is reachable, but ssh refused the user's credentials."""

    exit_code = 4


class InternalError(K2Error):
    """A bug in k2."""

    exit_code = 70
