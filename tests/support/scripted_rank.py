"""A rank without a model: it implements the protocol of a real one and computes nothing.

A real guard starts it with a hidden option, in place of ``k2cli.rank.main``. The environment
variable ``SCRIPT_FAIL`` names a way in which rank 1 fails while loading. With a script of answers
(``scripted_answers``) it answers as a model would that wrote these.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from k2cli.protocol import (
    Cancel,
    ControlEndpoint,
    ControlListening,
    EngineReady,
    Fatal,
    Finished,
    Generate,
    GuardMessage,
    Heartbeat,
    LoadProgress,
    RankReady,
    Shutdown,
    Start,
    Tokens,
)
from k2cli.protocol.progress_page import ProgressPage
from k2cli.protocol.wire import Channel, ConnectionLost
from k2cli.settings import RUN_OPTION

if TYPE_CHECKING:
    from tests.support.scripted_answers import ScriptedAnswers

WEIGHTS_BYTES = 1000


def _listen(link: Channel[GuardMessage], inbox: list[GuardMessage]) -> None:
    try:
        while True:
            message = link.receive()
            if message is not None and not isinstance(message, Heartbeat):
                inbox.append(message)
    except ConnectionLost:
        os._exit(1)


def _fail(how: str, link: Channel[GuardMessage]) -> None:
    match how:
        case "exit":
            sys.stderr.write("about to exit with status 3\n")
            os._exit(3)
        case "fatal":
            link.send(Fatal("tensor x has 3 elements, expected 4", kind="memory"))
            os._exit(1)
        case "hang":
            time.sleep(3600)
        case "term":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "memory":
            Path(os.environ["SCRIPT_CGROUP"], "cgroup.procs").write_text(str(os.getpid()))
            held = []
            while True:
                held.append(bytearray(2**20))


def _answer(link: Channel[GuardMessage], request: Generate) -> None:
    """Send each prompt token back, one by one."""
    for token in request.prompt[: request.max_tokens]:
        link.send(Tokens(request.request_id, [token]))
    count = min(len(request.prompt), request.max_tokens)
    link.send(Finished(request.request_id, "length", len(request.prompt), count, 0, 0.0, 0.1, 0.1))


def _script(model_path: str) -> ScriptedAnswers | None:
    if not os.environ.get("SCRIPT_ANSWERS"):
        return None
    from tests.support.scripted_answers import answers_of_environment

    return answers_of_environment(model_path)


def _serve(
    link: Channel[GuardMessage],
    page: ProgressPage,
    inbox: list[GuardMessage],
    answers: ScriptedAnswers | None,
) -> None:
    def cancelled(request_id: str) -> bool:
        page.advance("busy")
        return Cancel(request_id) in inbox

    while True:
        page.advance("idle")
        while inbox:
            match inbox.pop(0):
                case Shutdown():
                    os._exit(0)
                case Generate(max_tokens=1_000_000):
                    pass  # never answered
                case Generate() as request if answers is not None:
                    answers.answer(request, link.send, cancelled)
                case Generate() as request:
                    _answer(link, request)
                case Cancel() | ControlEndpoint():
                    pass
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in (RUN_OPTION, "--rank", "--guard-fd", "--progress-fd"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    link: Channel[GuardMessage] = Channel(socket.socket(fileno=int(options.guard_fd)), GuardMessage)
    page = ProgressPage(int(options.progress_fd))
    start = link.receive()
    assert isinstance(start, Start)
    inbox: list[GuardMessage] = []
    threading.Thread(target=_listen, args=(link, inbox), daemon=True).start()
    rank, size = start.assignment.rank, start.assignment.size
    print(f"rank {rank} of {size} says hello", flush=True)  # noqa: T201
    for done in (0, WEIGHTS_BYTES):
        page.advance("loading")
        link.send(LoadProgress(rank, "loading", done, WEIGHTS_BYTES))
    if rank == size - 1 and (how := os.environ.get("SCRIPT_FAIL")):
        _fail(how, link)
    if rank == 0 and size > 1:
        link.send(ControlListening(4242))
    while rank > 0 and not any(isinstance(message, ControlEndpoint) for message in inbox):
        page.advance("loading")
        time.sleep(0.02)
    link.send(RankReady(rank, WEIGHTS_BYTES + rank, 2000, 3000, 0.1))
    page.advance("idle")
    if rank == 0:
        link.send(EngineReady())
    answers = _script(start.assignment.model_path) if rank == 0 else None
    _serve(link, page, inbox, answers)


if __name__ == "__main__":
    main()
