"""The process that reads requests for the guard, which can kill it.

It reads frames from stdin, answers on stdout, one at a time, and ends with its stdin.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from k2cli.child_process import limit_memory
from k2cli.errors import K2Error
from k2cli.models.text.chat_template import TemplateSources
from k2cli.models.text.launch_check import load_checked, load_known
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol.wire import LENGTH, frame
from k2cli.server.reader_messages import (
    KnownTemplates,
    Loaded,
    NotLoaded,
    ReaderSettings,
    Trying,
)


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


def _load(settings: ReaderSettings, tell: Callable[[msgspec.Struct], None]) -> Tokenizer | None:
    """Load the tokenizer and tell the guard every step; return None if a file cannot be used."""

    def announce(file: str, work: str) -> None:
        tell(Trying(file, work))

    folder, known = Path(settings.folder), settings.templates
    try:
        if known is None:
            tokenizer = load_checked(folder, announce)
        else:
            sources = TemplateSources(*msgspec.structs.astuple(known))
            tokenizer = load_known(folder, sources, announce)
    except K2Error as error:
        tell(NotLoaded(error.message))
        return None
    sources = tokenizer.template_sources
    tell(Loaded(KnownTemplates(*dataclasses.astuple(sources))))
    return tokenizer


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")

    def tell(message: msgspec.Struct) -> None:
        try:
            answers.write(frame(message))
            answers.flush()
        except OSError:  # the guard is gone, and the thread that reads has not noticed yet
            os._exit(0)

    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    arguments = (sys.stdin.buffer, frames)
    threading.Thread(target=_frames_until_the_end, args=arguments, daemon=True).start()
    settings = msgspec.msgpack.decode(frames.get(), type=ReaderSettings)
    # A template can make a text of any length. On macOS the guard ends it a moment later.
    limit_memory(settings.memory_bytes)
    tokenizer = _load(settings, tell)
    if tokenizer is None:
        return
    # The types of requests take long to import: the guard waits for the check of the files first.
    from k2cli.guard.output_format import output_format_of
    from k2cli.server.read_request import UnreadRequest, read_request
    from k2cli.server.served_model import ServedModel

    served = ServedModel(
        settings.name,
        settings.context_length,
        default_temperature=settings.default_temperature,
        default_top_p=settings.default_top_p,
        default_top_k=settings.default_top_k,
        aliases=settings.aliases,
        output_format=output_format_of(tokenizer, settings.tool_parser, settings.reasoning_parser),
        normalizes_prompts=settings.normalizes_prompts,
    )
    decoder = msgspec.msgpack.Decoder(UnreadRequest)
    while True:
        tell(read_request(decoder.decode(frames.get()), tokenizer, served))


if __name__ == "__main__":
    main()
