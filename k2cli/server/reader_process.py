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
from k2cli.protocol import Generate
from k2cli.protocol.wire import LENGTH, frame
from k2cli.server.engine_request import (
    ServerTokenizer,
    prepare_chat,
    prepare_completion,
    prepare_tokenize,
)
from k2cli.server.errors import ApiError, validation_failure
from k2cli.server.schemas import ChatCompletionBody, CompletionBody, GenerationBody, TokenizeBody
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
    """A request that is fit for the engine, or the reason why it is not.

    Attributes:
        generate: what the engine is asked; None for a request to tokenize.
        stops: stop strings, which the engine never sees.
        stream: True if the answer is to be streamed.
        wants_usage: True if the stream is to end with a usage chunk.
        wants_progress: True if the stream is to carry ``"k2"`` objects.
        tokens: token ids, for a request to tokenize.
    """

    generate: Generate | None = None
    stops: list[str] = []
    stream: bool = False
    wants_usage: bool = False
    wants_progress: bool = False
    tokens: list[int] = []
    refusal: Refusal | None = None


def read_request(
    unread: UnreadRequest, tokenizer: ServerTokenizer, served: ServedModel
) -> ReadRequest:
    """Read one request to the end. Errors of the client become a ``refusal``."""
    try:
        return _read(unread, tokenizer, served)
    except ValidationError as error:
        refused = validation_failure(error)
    except ApiError as error:
        refused = error
    except K2Error as error:
        refused = ApiError(400, error.message)
    return ReadRequest(
        refusal=Refusal(
            refused.status, refused.message, refused.kind, refused.param, refused.code
        )
    )


def _read(unread: UnreadRequest, tokenizer: ServerTokenizer, served: ServedModel) -> ReadRequest:
    body: GenerationBody
    match unread.kind:
        case "tokenize":
            asked = TokenizeBody.model_validate_json(unread.body)
            return ReadRequest(tokens=prepare_tokenize(asked, tokenizer, served))
        case "chat":
            body = ChatCompletionBody.model_validate_json(unread.body)
            prepared = prepare_chat(body, tokenizer, served)
        case "completion":
            body = CompletionBody.model_validate_json(unread.body)
            prepared = prepare_completion(body, tokenizer, served)
    return ReadRequest(
        generate=prepared.generate,
        stops=list(prepared.stops),
        stream=bool(body.stream),
        wants_usage=body.wants_usage,
        wants_progress=body.wants_progress,
    )


def _next_frame(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    body = source.read(size)
    return body if len(body) == size else None


def _frames_until_the_end(source: BinaryIO, frames: queue.SimpleQueue[bytes]) -> None:
    """Put frames into the queue; end the process with its input, even in the middle of a request."""
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
