"""The process that computes masks for the leader rank: ``python -m k2cli.grammars.mask_process``.

It is a process because llguidance holds Python's lock for seconds while it reads a tokenizer, and
because what ends or fills it must not end or fill a rank that holds a model. Orders come on stdin,
a socket, on which the answers go back; the process ends with it. One thread compiles grammars, so
that another can go on computing masks meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path

import psutil

from k2cli.child_process import end_with_parent, limit_memory
from k2cli.errors import K2Error
from k2cli.grammars.mask_messages import (
    Close,
    Complete,
    Loaded,
    Mask,
    News,
    Open,
    Order,
    Refused,
    Setup,
    Take,
)
from k2cli.grammars.matchers import Compiler, Matcher
from k2cli.protocol.wire import Channel, ConnectionLost
from k2cli.settings import RUN_OPTION
from k2cli.system.memory_use import memory_of

_SWITCH_SECONDS = 0.0005
_STACK_BYTES = 64 * 2**20
"""Stack of each thread: llguidance recurses into nested schemas, and macOS gives one 512 kB."""

_FORGET_ABOVE = 0.5
_TAKES_PER_CHECK = 200
"""Lexers learn states while answers are followed, and keep them for later answers."""

_ORPHAN_SECONDS = 60.0
"""Processor time after which the system ends a process that reads no orders.

Native code that holds Python's lock would keep it from noticing that its rank is gone.
"""


class MaskProcess:
    """All answers with grammars of one run, and the threads that work on them."""

    def __init__(self, setup: Setup, channel: Channel[Order]) -> None:
        self._setup = setup
        self._channel = channel
        self._sending = threading.Lock()
        self._opening: queue.SimpleQueue[Open | Close] = queue.SimpleQueue()
        self._taking: queue.SimpleQueue[Take] = queue.SimpleQueue()
        self._matchers: dict[int, Matcher] = {}
        self._closed: set[int] = set()
        self._compiler: Compiler | None = None

    def run(self) -> None:
        """Carry out orders until there are no more; never returns."""
        threading.stack_size(_STACK_BYTES)
        threading.Thread(target=self._take_tokens, daemon=True).start()
        threading.Thread(target=self._open_answers, daemon=True).start()
        with contextlib.suppress(ConnectionLost):
            while (order := self._channel.receive()) is not None:
                signal.setitimer(signal.ITIMER_PROF, _ORPHAN_SECONDS)
                if isinstance(order, Take):
                    self._taking.put(order)
                    continue
                if isinstance(order, Close):
                    self._closed.add(order.answer)
                if isinstance(order, Open | Close):
                    self._opening.put(order)
        os._exit(0)

    def _tell(self, news: News) -> None:
        try:
            with self._sending:
                self._channel.send(news)
        except ConnectionLost:
            os._exit(0)

    def _open_answers(self) -> None:
        while True:
            order = self._opening.get()
            if isinstance(order, Close):
                self._matchers.pop(order.answer, None)
                self._closed.discard(order.answer)
            elif order.answer not in self._closed:
                self._open(order)
                self._check_memory()

    def _open(self, order: Open) -> None:
        try:
            if self._compiler is None:
                folder = Path(self._setup.folder)
                self._compiler = Compiler(folder, self._setup.rows, order.stop_tokens)
                self._tell(Loaded())
            matcher = self._compiler.open(order.grammar, order.prefix, order.stop_tokens)
            self._matchers[order.answer] = matcher
            self._send_mask(order.answer, matcher)
        except BaseException as error:  # a panic of llguidance is no Exception
            self._refuse(order.answer, error)

    def _take_tokens(self) -> None:
        for number in itertools.count(1):
            if number % _TAKES_PER_CHECK == 0:
                self._check_memory()
            order = self._taking.get()
            matcher = self._matchers.get(order.answer)
            if matcher is None:
                continue
            try:
                matcher.take([order.token])
                self._send_mask(order.answer, matcher)
            except BaseException as error:  # as above
                self._refuse(order.answer, error)

    def _send_mask(self, answer: int, matcher: Matcher) -> None:
        bits = matcher.mask()
        self._tell(Complete(answer) if bits is None else Mask(answer, bits))

    def _refuse(self, answer: int, error: BaseException) -> None:
        self._matchers.pop(answer, None)
        if isinstance(error, K2Error):
            self._tell(Refused(answer, error.message, invalid=True))
        else:
            self._tell(Refused(answer, f"{type(error).__name__}: {error}", invalid=False))

    def _check_memory(self) -> None:
        """Forget grammars that no answer uses if memory is short; on macOS end if that is no help.

        Linux enforces the limit, and macOS does not.
        """
        taken = memory_of(psutil.Process())
        if taken > _FORGET_ABOVE * self._setup.memory_bytes and self._compiler is not None:
            self._compiler.forget()
        if sys.platform == "darwin" and taken > self._setup.memory_bytes:
            os._exit(1)


def main() -> None:
    """Serve one rank until stdin ends; never returns."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_SECONDS)
    parser = argparse.ArgumentParser(prog="k2cli.grammars.mask_process")
    parser.add_argument(RUN_OPTION, required=True, help="id of the run")
    parser.parse_args()
    channel: Channel[Order] = Channel(socket.socket(fileno=0), Order)
    setup = channel.receive()
    assert isinstance(setup, Setup)
    limit_memory(setup.memory_bytes)
    MaskProcess(setup, channel).run()


if __name__ == "__main__":
    main()
