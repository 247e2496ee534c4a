"""Reading of a request from start to end: JSON, validation, chat template and tokenizer.

A client decides how long this takes, and it holds Python's lock, so it is done in processes of
their own (``guard.reader_process``). The messages to and from such a process are declared here.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from pydantic import ValidationError

from k2cli.errors import K2Error
from k2cli.server.dialects.anthropic_conversation import anthropic_conversation
from k2cli.server.dialects.anthropic_schemas import MessagesBody
from k2cli.server.dialects.openai_schemas import ChatCompletionBody, CompletionBody, TokenizeBody
from k2cli.server.dialects.responses_conversation import responses_conversation
from k2cli.server.dialects.responses_schemas import ResponsesBody
from k2cli.server.engine_request import (
    EngineRequest,
    ServerTokenizer,
    check_model,
    conversation_request,
    conversation_tokens,
    prompt_request,
    text_tokens,
)
from k2cli.server.errors import ApiError, invalid, validation_failure, without_folders
from k2cli.server.served_model import ServedModel

RequestKind = Literal["chat", "completion", "tokenize", "messages", "count_tokens", "responses"]


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
                return ReadRequest(tokens=_tokenized(count, tokenizer, served))
            case "chat":
                chat = ChatCompletionBody.model_validate_json(unread.body)
                request = conversation_request(
                    chat.conversation, chat.answer_options, tokenizer, served
                )
                return ReadRequest(request)
            case "completion":
                completion = CompletionBody.model_validate_json(unread.body)
                options = completion.answer_options
                return ReadRequest(prompt_request(completion.prompt, options, tokenizer, served))
            case "responses":
                asked_items = ResponsesBody.model_validate_json(unread.body)
                conversation = responses_conversation(asked_items)
                options = asked_items.answer_options
                return ReadRequest(conversation_request(conversation, options, tokenizer, served))
            case "messages":
                asked = MessagesBody.model_validate_json(unread.body)
                conversation = anthropic_conversation(asked, served.normalizes_prompts)
                options = asked.answer_options
                return ReadRequest(conversation_request(conversation, options, tokenizer, served))
            case "count_tokens":
                asked = MessagesBody.model_validate_json(unread.body)
                check_model(asked.model, served)
                _ = asked.answer_options  # it refuses what the answer's request would refuse
                conversation = anthropic_conversation(asked, served.normalizes_prompts)
                return ReadRequest(tokens=conversation_tokens(conversation, tokenizer, served))
    except ValidationError as error:
        refused = validation_failure(error)
    except ApiError as error:
        refused = error
    except K2Error as error:
        refused = ApiError(400, without_folders(error.message))
    return ReadRequest(
        refusal=Refusal(refused.status, refused.message, refused.kind, refused.param, refused.code)
    )


def _tokenized(body: TokenizeBody, tokenizer: ServerTokenizer, served: ServedModel) -> list[int]:
    check_model(body.model, served)
    if (body.messages is None) == (body.prompt is None):
        raise invalid("give either messages or a prompt", "messages")
    if body.prompt is not None:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return text_tokens(body.prompt, special, tokenizer, served)
    conversation = body.conversation_of(body.messages or [], body.tools)
    return conversation_tokens(conversation, tokenizer, served)
