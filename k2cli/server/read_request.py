"""Reading of a request from start to end: JSON, validation, chat template and tokenizer.

A client decides how long this takes, and it holds Python's lock, so it is done in processes of
their own (``guard.reader_process``). The messages to and from such a process are declared here.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from pydantic import ValidationError

from k2cli.errors import K2Error
from k2cli.server.engine_request import (
    EngineRequest,
    ServerTokenizer,
    chat_request,
    completion_request,
    tokenize_body,
)
from k2cli.server.errors import ApiError, validation_failure, without_folders
from k2cli.server.schemas import ChatCompletionBody, CompletionBody, TokenizeBody
from k2cli.server.served_model import ServedModel

RequestKind = Literal["chat", "completion", "tokenize"]


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


def accepted(read: ReadRequest) -> ReadRequest:
    """Return a request that was read, if it was.

    Raises:
        ApiError: if it was refused.
    """
    refused = read.refusal
    if refused is None:
        return read
    raise ApiError(
        refused.status,
        refused.message,
        kind=refused.kind,
        param=refused.param,
        code=refused.code,
    )


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
        refused = ApiError(400, without_folders(error.message))
    return ReadRequest(
        refusal=Refusal(refused.status, refused.message, refused.kind, refused.param, refused.code)
    )
