"""The OpenAPI document of the HTTP API.

Bodies of requests are those of the dialects, so that a new field is in the document by itself. The
rules that a JSON schema cannot say, such as which fields exclude each other, are in
docs/reference/api.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from k2cli import __version__
from k2cli.files import encode_json
from k2cli.server.dialects.anthropic_schemas import MessagesBody
from k2cli.server.dialects.openai_schemas import ChatCompletionBody, CompletionBody, TokenizeBody
from k2cli.server.dialects.responses_schemas import ResponsesBody
from k2cli.server.metrics.status import Status
from k2cli.server.openapi import answers, answers_of_blocks
from k2cli.server.openapi.request_forms import FORMS

_JSON, _EVENTS = "application/json", "text/event-stream"
_COMPONENTS = "#/components/schemas/"
_STATUS_COMPONENTS = f"{_COMPONENTS}Status."
"""The names of types in the status are words that others have, too, such as Model."""

_STATUSES: Mapping[int, str] = {
    400: "The request is wrong; the message names the field.",
    401: "The run asks for an API key, and the request has none or a wrong one.",
    403: "The host or the origin of the request is not allowed, or not this route with this key.",
    404: "There is no such model, or file.",
    413: "The body is over the limit of bytes.",
    415: "The body is not declared as JSON.",
    429: "Too many requests are waiting, or the key is over its limits.",
    500: "A fault of the server or of a rank.",
    503: "The run is not ready, or too many large requests are being received.",
    529: "Too many large requests are being received.",
}
_EVENT = {
    "description": 'One of the server-sent events, if "stream" is true. Its data is JSON, or '
    '"[DONE]" at the end of Chat and Completions. A failure after the beginning is an event, too.',
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_ALWAYS = (400, 401, 403)
_READING = (*_ALWAYS, 404, 413, 415, 429, 500, 503)


@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of one route.

    Attributes:
        answer: the form of an answer with status 200; None if there is none.
        statuses: the statuses of errors.
        body: the form of the request; None for GET.
        streams: True if ``"stream": true`` gives events.
        anthropic: True if errors have Anthropic's form.
        keyless: True if the route needs no API key.
        other_kinds: the content types of an answer whose form is not described.
    """

    name: str
    summary: str
    answer: type[BaseModel] | type[Status] | None
    statuses: tuple[int, ...] = _ALWAYS
    body: type[BaseModel] | None = None
    streams: bool = False
    anthropic: bool = False
    keyless: bool = False
    other_kinds: tuple[str, ...] = ()


_OPERATIONS: Mapping[tuple[str, str], _Operation] = {
    ("post", "/v1/chat/completions"): _Operation(
        "createChatCompletion", "Answer a conversation (OpenAI's Chat Completions)",
        answers.ChatCompletion, _READING, ChatCompletionBody, streams=True,
    ),
    ("post", "/v1/completions"): _Operation(
        "createCompletion", "Continue a text or token ids, without a chat template",
        answers.Completion, _READING, CompletionBody, streams=True,
    ),
    ("post", "/v1/responses"): _Operation(
        "createResponse", "Answer a conversation (OpenAI's Responses); nothing is stored",
        answers_of_blocks.ResponseObject, _READING, ResponsesBody, streams=True,
    ),
    ("post", "/v1/messages"): _Operation(
        "createMessage", "Answer a conversation (Anthropic's Messages)",
        answers_of_blocks.MessageObject, (*_READING, 529), MessagesBody, streams=True,
        anthropic=True,
    ),
    ("post", "/v1/messages/count_tokens"): _Operation(
        "countTokens", "Count the tokens of a prompt",
        answers.InputTokens, (*_READING, 529), MessagesBody, anthropic=True,
    ),
    ("post", "/v1/tokenize"): _Operation(
        "tokenize", "Return the tokens of a prompt, with the chat template applied",
        answers.Tokens, _READING, TokenizeBody,
    ),
    ("post", "/v1/embeddings"): _Operation(
        "refuseEmbeddings", "Refused: a model that generates text has no useful embeddings",
        None, (*_ALWAYS, 413, 415, 503),
    ),
    ("get", "/v1/models"): _Operation(
        "listModels", "List the served model under each of its names", answers.ModelList
    ),
    ("get", "/v1/models/{name}"): _Operation(
        "getModel", "Return the served model by one of its names",
        answers.Model, (*_ALWAYS, 404),
    ),
    ("get", "/v1/status"): _Operation(
        "status", "Return the state of the run, its ranks and its requests", Status
    ),
    ("get", "/metrics"): _Operation(
        "metrics", "Return metrics for Prometheus, in OpenMetrics if the client asks for it",
        None, other_kinds=("text/plain", "application/openmetrics-text"),
    ),
    ("get", "/health"): _Operation(
        "health", "Return the state of the run; 503 while it is not ready",
        answers.Health, (400,), keyless=True,
    ),
    ("get", "/"): _Operation(
        "root", "Return the name of the server, and to a browser the web page",
        answers.Root, (400, 403), keyless=True, other_kinds=("text/html",),
    ),
    ("get", "/page/{name}"): _Operation(
        "pageFile", "Return a file that the web page loads",
        None, (400, 403, 404), keyless=True,
        other_kinds=("text/css", "text/javascript", "image/svg+xml"),
    ),
    ("get", "/openapi.json"): _Operation(
        "openapi", "Return this document", None, (400, 403), keyless=True, other_kinds=(_JSON,)
    ),
}  # fmt: skip


class _Schemas(GenerateJsonSchema):
    """Schemas without titles that only repeat names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def openapi_document() -> dict[str, Any]:
    """Build the document; it depends on the version of k2 alone."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "k2",
            "version": __version__,
            "summary": "The HTTP API of a run",
            "description": "Routes of OpenAI and Anthropic over one model. Members that are null "
            "are absent. docs/reference/api.md says what each field does.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        # A run that was started without a key needs none.
        "security": [{"bearer": []}, {"header": []}, {}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": _components(),
        },
    }


@functools.cache
def openapi_json() -> bytes:
    """Return the document as JSON; it is built once."""
    return encode_json(openapi_document())


def _paths() -> dict[str, dict[str, Any]]:
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in _OPERATIONS.items():
        paths.setdefault(path, {})[method] = _described(path, operation)
    return paths


def _described(path: str, operation: _Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    if operation.keyless:
        described["security"] = []
    if "{name}" in path:
        name = {"type": "string", "minLength": 1}
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": name}]
    if operation.body is not None:
        content = {_JSON: {"schema": _reference(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    return {**described, "responses": _responses(path, operation)}


def _responses(path: str, operation: _Operation) -> dict[str, Any]:
    failure = answers.AnthropicError if operation.anthropic else answers.Error
    responses: dict[str, Any] = {}
    if operation.answer is not None:
        # An answer that fails after 9 s has status 200 already.
        late = [_reference(operation.answer), _reference(failure)]
        schema = {"anyOf": late} if operation.streams else late[0]
        content: dict[str, Any] = {_JSON: {"schema": schema}}
        if operation.streams:
            content[_EVENTS] = {"schema": _EVENT}
        content |= {kind: {"schema": {}} for kind in operation.other_kinds}
        responses["200"] = {"description": "The answer.", "content": content}
    elif operation.other_kinds:
        content = {kind: {"schema": {}} for kind in operation.other_kinds}
        responses["200"] = {"description": "The document.", "content": content}
    for status in operation.statuses:
        content = {_JSON: {"schema": _reference(failure)}}
        responses[str(status)] = {"description": _STATUSES[status], "content": content}
    if path == "/health":
        state = {_JSON: {"schema": _reference(answers.Health)}}
        responses["503"] = {"description": "The run is not ready.", "content": state}
    return responses


def _reference(model: type[BaseModel] | type[Status]) -> dict[str, str]:
    return {"$ref": f"{_STATUS_COMPONENTS if model is Status else _COMPONENTS}{model.__name__}"}


def _components() -> dict[str, Any]:
    used = [answers.Error, answers.AnthropicError, answers.Health]
    for operation in _OPERATIONS.values():
        models = [model for model in (operation.body, operation.answer) if model is not None]
        used += [model for model in models if issubclass(model, BaseModel)]
    kinds: list[tuple[Any, Literal["validation"]]]
    kinds = [(model, "validation") for model in dict.fromkeys(used)]
    _, made = models_json_schema(
        kinds,
        ref_template=f"{_COMPONENTS}{{model}}",
        schema_generator=_Schemas,
    )
    template = f"{_STATUS_COMPONENTS}{{name}}"
    _, status = msgspec.json.schema_components([Status], ref_template=template)
    for name, forms in FORMS.items():
        members = made["$defs"][name]["properties"]
        members |= {member: form for member, form in forms.items() if member in members}
    schemas = {**made["$defs"], **{f"Status.{name}": schema for name, schema in status.items()}}
    return {name: _cleaned(schema) for name, schema in sorted(schemas.items())}


def _cleaned(part: Any) -> Any:
    """Remove defaults of null, and the line breaks and quotes of docstrings."""
    if isinstance(part, list):
        return [_cleaned(each) for each in part]
    if not isinstance(part, dict):
        return part
    cleaned = {}
    for name, value in part.items():
        if name == "description" and isinstance(value, str):
            cleaned[name] = " ".join(value.replace("``", "`").split())
        elif name != "default" or value is not None:
            cleaned[name] = _cleaned(value)
    return cleaned
