"""The leader rank's side of its mask process: answers with grammars, and their next masks.

The process is started by the first request with a grammar, and anew after it has ended. If it ends
or exceeds a limit of time, all answers with grammars have a ``problem``, and no others. Nothing
here waits for it but ``wait`` and ``wait_for_news``.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from k2cli.grammars.mask_messages import (
    Close,
    Complete,
    Loaded,
    Mask,
    News,
    Open,
    Refused,
    Setup,
    Take,
)
from k2cli.pauses import Deadline
from k2cli.protocol import Assignment, Grammar
from k2cli.protocol.wire import ConnectionLost, Frames, frame
from k2cli.settings import RUN_OPTION

MODULE = "k2cli.grammars.mask_process"
LOAD_SECONDS = 60.0
"""Limit of starting the process and reading the tokenizer (K2's: 4 s of the processor)."""

ANSWER_SECONDS = 10.0
"""Limit of compiling one grammar, and of one mask."""

MEMORY_BYTES = 3 * 2**30
"""Memory that the process may have. It takes 0.3 GB with K2's tokenizer, 0.4 while it reads it."""

_MOST_OPENING = 4
_BUFFER_BYTES = 2**20  # macOS gives a socket pair 8 kB, and a mask of K2 has 20 kB
_RECEIVE_BYTES = 2**18


@dataclass(frozen=True, slots=True)
class Problem:
    """The reason for which an answer cannot go on, in words for the client."""

    text: str
    kind: Literal["invalid", "internal"]


@dataclass(slots=True, eq=False)
class MaskedAnswer:
    """An answer with a grammar. ``mask``, of its next token, is None until it has come."""

    number: int
    opened: bool = False
    mask: bytes | None = None
    complete: bool = False
    problem: Problem | None = None

    @property
    def pending(self) -> bool:
        """True while the process has not said how the answer may go on."""
        return self.mask is None and not self.complete and self.problem is None


class Masks:
    """All answers with grammars of a run, and the process that computes their masks.

    Args:
        assignment: names the checkpoint, and the run, for the process's command line, by which
            ``k2 stop`` and ``k2 ps`` know it.
        about_to_wait: is called several times a second while an answer is waited for.
    """

    def __init__(self, assignment: Assignment, about_to_wait: Callable[[], None]) -> None:
        self._command = [sys.executable, "-P", "-m", MODULE, RUN_OPTION, assignment.run_id]
        self._folder = assignment.model_path
        self._about_to_wait = about_to_wait
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._outgoing = bytearray()
        self._incoming: Frames[News] = Frames(News)
        self._answers: dict[int, MaskedAnswer] = {}
        self._unopened: deque[Open] = deque()
        self._opening: set[int] = set()
        self._open_limit = Deadline(LOAD_SECONDS)
        self._last_number = 0
        self.rows = 0
        """Scores that the model gives for each token; set it before the first ``open``."""

    def open(self, grammar: Grammar, stop_tokens: Sequence[int]) -> MaskedAnswer:
        """Begin an answer that obeys a grammar. Its first mask comes later."""
        self.poll()  # the process may have ended while there was no answer
        self._last_number += 1
        answer = MaskedAnswer(self._last_number)
        try:
            if self._process is None:
                self._start()
        except OSError as error:
            text = f"the process for grammars could not be started: {error.strerror}"
            answer.problem = Problem(text, "internal")
            return answer
        self._answers[answer.number] = answer
        order = Open(answer.number, grammar.text, grammar.prefix, list(stop_tokens))
        self._unopened.append(order)
        self.poll()
        return answer

    def take(self, answer: MaskedAnswer, token: int) -> None:
        """Add a chosen token to an answer, whose next mask is computed now."""
        if answer.problem is None:
            answer.mask = None
            self._outgoing += frame(Take(answer.number, token))
            self._write()

    def close(self, answer: MaskedAnswer) -> None:
        """Forget an answer that has ended."""
        if self._answers.pop(answer.number, None) is None:
            return
        unopened = [order for order in self._unopened if order.answer != answer.number]
        if len(unopened) < len(self._unopened):
            self._unopened = deque(unopened)
            return
        self._opened(answer.number)
        self._outgoing += frame(Close(answer.number))
        self._write()

    def poll(self) -> None:
        """Send what waits to be sent, and note what has come."""
        if self._process is None:
            return
        self._send_opens()
        self._read()
        self._write()
        if self._opening and self._open_limit.has_passed:
            self._lose(f"took longer than {self._open_limit.seconds:.0f} s for a grammar")

    def wait(self, answers: Sequence[MaskedAnswer]) -> None:
        """Wait until none of these answers is pending."""
        limit = Deadline(ANSWER_SECONDS)
        self.poll()
        while any(answer.pending for answer in answers):
            if limit.has_passed:
                self._lose(f"took longer than {ANSWER_SECONDS:.0f} s for a token")
                return
            self._about_to_wait()
            self.wait_for_news(limit.next_wait())
            self.poll()

    def wait_for_news(self, seconds: float) -> None:
        """Wait until the process has sent something, or for so many seconds."""
        if self._socket is not None:
            waiter = select.poll()  # ``select`` takes no descriptors above 1023
            waiter.register(self._socket, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
            waiter.poll(math.ceil(seconds * 1000))

    def end(self) -> None:
        """End the process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    # --- the process -----------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the process.

        Without ``close_fds`` and functions to run in the child, Python uses ``posix_spawn`` on
        macOS, where forking a process with a model's memory would take long; on Linux it uses that
        or ``vfork``.

        Raises:
            OSError: if the system does not allow it now.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        _inherit_nothing()
        try:
            self._process = subprocess.Popen(
                self._command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, close_fds=False
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._socket = ours
        self._outgoing = bytearray(frame(Setup(self._folder, self.rows, MEMORY_BYTES)))
        self._incoming = Frames(News)
        self._open_limit = Deadline(LOAD_SECONDS)

    def _lose(self, cause: str) -> None:
        """End the process, and with it all answers; the next one starts it again."""
        self.end()
        text = (
            f"the process that makes answers obey grammars {cause}, so this answer ended; "
            "the next request with a grammar starts it anew"
        )
        for answer in self._answers.values():
            if not answer.complete and answer.problem is None:
                answer.problem = Problem(text, "internal")
        self._answers.clear()
        self._unopened.clear()
        self._opening.clear()

    def _died(self) -> None:
        cause = "ended"
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(1.0)
                cause = f"was ended by signal {-status}" if status < 0 else f"ended ({status})"
        self._lose(cause)

    # --- messages --------------------------------------------------------------------------------

    def _send_opens(self) -> None:
        """Send the grammars of some requests: a text may have a megabyte."""
        while self._unopened and len(self._opening) < _MOST_OPENING:
            if not self._opening:
                self._open_limit = Deadline(self._open_limit.seconds, None)
            order = self._unopened.popleft()
            self._opening.add(order.answer)
            self._outgoing += frame(order)

    def _opened(self, number: int) -> None:
        if number in self._opening:
            self._opening.discard(number)
            self._open_limit = Deadline(self._open_limit.seconds)
            self._send_opens()

    def _write(self) -> None:
        while self._socket is not None and self._outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except BlockingIOError:
                return
            except OSError:
                self._died()
                return
            del self._outgoing[:sent]

    def _read(self) -> None:
        while self._socket is not None:
            try:
                chunk = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                chunk = b""
            if not chunk:
                self._died()
                return
            self._incoming.add(chunk)
            try:
                while (news := self._incoming.take()) is not None:
                    self._note(news)
            except ConnectionLost:
                self._lose("broke the protocol")
                return

    def _note(self, news: News) -> None:
        if isinstance(news, Loaded):
            self._open_limit = Deadline(ANSWER_SECONDS)
            return
        self._opened(news.answer)
        answer = self._answers.get(news.answer)
        if answer is None:
            return
        answer.opened = True
        match news:
            case Mask(bits=bits):
                answer.mask = bits
            case Complete():
                answer.complete = True
            case Refused(error=error, invalid=invalid):
                text = f"the answer cannot obey the grammar: {error}"
                answer.problem = Problem(text, "invalid" if invalid else "internal")


def _inherit_nothing() -> None:
    """Keep a child from inheriting this process's connections, to its guard and to other ranks."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/dev/fd"):
            if int(name) > 2:
                with contextlib.suppress(OSError):
                    os.set_inheritable(int(name), False)
