"""The process that reads requests: JSON, validation, chat template and tokenizer.

A client decides how long these take, and they hold Python's lock while they work. So they run in a
process of their own, ``python -m k2cli.server.reader_process``, which the guard can kill. It reads
frames from stdin and answers on stdout, one at a time, and ends with its stdin.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
from pydantic import ValidationError

from k2cli.errors import K2Error
from k2cli.protocol.wire import LENGTH, frame
from k2cli.server.engine_request import (
    EngineRequest,
    ServerTokenizer,
    chat_request,
    completion_request,
    tokenize_body,
)
from k2cli.server.errors import ApiError, validation_failure
from k2cli.server.schemas import ChatCompletionBody, CompletionBody, TokenizeBody
from k2cli.server.served_model import ServedModel

RequestKind = Literal["chat", "completion", "tokenize"]


class ReaderSettings(msgspec.Struct, frozen=True):
    """The first frame to a reader process: whose requests it reads."""

    folder: str
    name: str
    context_length: int
    default_temperature: float
    default_top_p: float
    default_top_k: int


class UnreadRequest(msgspec.Struct, frozen=True):
    """A request body as a client sent it."""

    kind: RequestKind
    body: bytes


class Refusal(msgspec.Struct, frozen=True):
    """The members of an ``ApiError``."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None


class ReadRequest(msgspec.Struct, frozen=True):
    """One of: a request for the engine, token ids of a request to count them, or a refusal."""

    engine_request: EngineRequest | None = None
    tokens: list[int] = []
    refusal: Refusal | None = None


def read_request(
    unread: UnreadRequest, tokenizer: ServerTokenizer, served: ServedModel
) -> ReadRequest:
    """Read one request to the end. Errors of the client become a ``refusal``."""
    try:
        match unread.kind:
            case "tokenize":
                count = TokenizeBody.model_validate_json(unread.body)
                return ReadRequest(tokens=tokenize_body(count, tokenizer, served))
            case "chat":
                chat = ChatCompletionBody.model_validate_json(unread.body)
                return ReadRequest(chat_request(chat, tokenizer, served))
            case "completion":
                completion = CompletionBody.model_validate_json(unread.body)
                return ReadRequest(completion_request(completion, tokenizer, served))
    except ValidationError as error:
        refused = validation_failure(error)
    except ApiError as error:
        refused = error
    except K2Error as error:
        refused = ApiError(400, error.message)
    return ReadRequest(
        refusal=Refusal(refused.status, refused.message, refused.kind, refused.param, refused.code)
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


def main() -> None:
    """Answer requests until stdin ends."""
    from k2cli.models.text.tokenizer import Tokenizer

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
