"""The process that reads requests for the guard, which can kill it.

It reads frames from stdin, answers on stdout, one at a time, and ends with its stdin.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec

from k2cli.protocol.wire import LENGTH, frame
from k2cli.server.read_request import ReaderSettings, UnreadRequest, read_request
from k2cli.server.served_model import ServedModel
from k2cli.units import GIB

MEMORY_BYTES = 6 * GIB
"""Enough for 32 MiB of JSON as Python objects, and for K2's tokenizer."""


def _next_frame(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    body = source.read(size)
    return body if len(body) == size else None


def _frames_until_the_end(source: BinaryIO, frames: queue.SimpleQueue[bytes]) -> None:
    """Put frames into the queue, and end the process with its input, whatever it is doing."""
    while (body := _next_frame(source)) is not None:
        frames.put(body)
    os._exit(0)


def _limit_memory() -> None:
    """Limit this process's memory, which is beside a model that needs the rest of the machine.

    A template can make a text of any length. Linux enforces the limit; macOS does not.
    """
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, hard))


def main() -> None:
    """Answer requests until stdin ends."""
    from k2cli.models.text.tokenizer import Tokenizer

    _limit_memory()

    answers = os.fdopen(os.dup(1), "wb")
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    arguments = (sys.stdin.buffer, frames)
    threading.Thread(target=_frames_until_the_end, args=arguments, daemon=True).start()
    settings = msgspec.msgpack.decode(frames.get(), type=ReaderSettings)
    tokenizer = Tokenizer.load(Path(settings.folder))
    served = ServedModel(
        settings.name,
        settings.context_length,
        default_temperature=settings.default_temperature,
        default_top_p=settings.default_top_p,
        default_top_k=settings.default_top_k,
    )
    decoder = msgspec.msgpack.Decoder(UnreadRequest)
    while True:
        answers.write(frame(read_request(decoder.decode(frames.get()), tokenizer, served)))
        answers.flush()


if __name__ == "__main__":
    main()
