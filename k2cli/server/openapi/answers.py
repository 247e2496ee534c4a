"""The forms of answers, as pydantic models for the OpenAPI document.

The writers in ``dialects`` make plain dicts; these classes say what is in them and validate
nothing. schemathesis compares real answers with them (``tests/clients/test_schemathesis.py``).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls"]
MAY_BE_ABSENT: Any = Field(default=None)
"""Default of a member that some answers do not have."""


class Answer(BaseModel):
    """An object of an answer, which has no other members than these."""

    model_config = ConfigDict(extra="forbid")


# --- errors ---------------------------------------------------------------------------------------


class ErrorMembers(Answer):
    """Message of an error and its kind; ``param`` is the field of the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """An error in OpenAI's form."""

    error: ErrorMembers


class AnthropicErrorMembers(Answer):
    """Message of an error and its kind, in the words of Anthropic."""

    type: str
    message: str
    details: dict[str, Any] = MAY_BE_ABSENT


class AnthropicError(Answer):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: AnthropicErrorMembers
    request_id: str


# --- usage ----------------------------------------------------------------------------------------


class Timings(Answer):
    """Seconds by the clock of the leader rank, and tokens per second."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None


class CachedTokens(Answer):
    """Tokens of the prompt that came from the cache."""

    cached_tokens: int


class ReasoningTokens(Answer):
    """Tokens of the answer that were reasoning."""

    reasoning_tokens: int


class CompletionDetails(ReasoningTokens):
    """Tokens of the answer by kind. Rejected ones were guessed, and are no part of the answer."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    """Tokens and times; ``max_tokens`` if the context had less room than was asked for."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: CompletionDetails
    max_tokens: int = MAY_BE_ABSENT
    timings: Timings = MAY_BE_ABSENT


# --- Chat and Completions -------------------------------------------------------------------------


class CalledFunction(Answer):
    """A called function; ``arguments`` is the model's own text."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Answer):
    """The model's turn. Both members of reasoning have the same text."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = MAY_BE_ABSENT
    reasoning: str = MAY_BE_ABSENT
    tool_calls: list[ToolCall] = MAY_BE_ABSENT


class TokenChance(Answer):
    """A token, its log-probability and its bytes, null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ScoredToken(TokenChance):
    """A token of the answer and the likeliest ones at its place."""

    top_logprobs: list[TokenChance]


class ChatLogprobs(Answer):
    """Log-probabilities of the content."""

    content: list[ScoredToken]
    refusal: None


class ChatChoice(Answer):
    """The one answer."""

    index: Literal[0]
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(Answer):
    """Log-probabilities of the text, token by token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Answer):
    """The one text."""

    index: Literal[0]
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(Answer):
    """The continuation of a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


# --- the others -----------------------------------------------------------------------------------


class InputTokens(Answer):
    """The number of tokens of a prompt."""

    input_tokens: int


class Tokens(Answer):
    """The tokens of a prompt."""

    model: str
    count: int
    tokens: list[int]
    context_length: int


class Model(BaseModel):
    """The served model; with the header ``anthropic-version``, Anthropic's members too."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["k2"]
    context_length: int
    tool_parser: str
    reasoning_parser: str


class ModelList(BaseModel):
    """The served model under each of its names."""

    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    """The state of the run."""

    state: str
    model: str
    cause: str = MAY_BE_ABSENT


class Root(Answer):
    """The name of the server."""

    server: Literal["k2"]
