"""The forms of answers that are lists of items or blocks: Responses and Messages.

See ``answers``.
"""

from __future__ import annotations

from typing import Any, Literal

from k2cli.server.openapi.answers import MAY_BE_ABSENT, Answer, ReasoningTokens, Timings

ItemStatus = Literal["completed", "incomplete"]


# --- Responses ------------------------------------------------------------------------------------


class OutputText(Answer):
    """Text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(Answer):
    """A message of the model."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningText(Answer):
    """Text of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(Answer):
    """Reasoning of the model."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]
    encrypted_content: None


class OutputCall(Answer):
    """A call that the model made."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    namespace: str = MAY_BE_ABSENT
    arguments: str


class InputDetails(Answer):
    """Tokens of the prompt that came from the cache."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(Answer):
    """Tokens and times."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int
    timings: Timings = MAY_BE_ABSENT


class IncompleteDetails(Answer):
    """Reason for which an answer is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(Answer):
    """A response: a list of items, in the order of the model's text."""

    id: str
    object: Literal["response"]
    created_at: int
    status: ItemStatus
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: None
    max_output_tokens: int
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputReasoning | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage


# --- Messages -------------------------------------------------------------------------------------


class TextBlock(Answer):
    """Text of the model."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Answer):
    """Reasoning of the model; nothing is signed."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(Answer):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(Answer):
    """Tokens of the answer that were reasoning."""

    thinking_tokens: int


class MessageUsage(Answer):
    """Tokens and times; ``input_tokens`` has those only that were computed."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    max_tokens: int = MAY_BE_ABSENT
    timings: Timings = MAY_BE_ABSENT


class MessageObject(Answer):
    """The answer to a conversation, in Anthropic's form."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: MessageUsage
