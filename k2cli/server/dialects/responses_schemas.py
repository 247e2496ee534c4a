"""Request bodies of OpenAI's Responses API, as pydantic models.

As in the other dialects, a field is used, or accepted and ignored because the answer is the same
without it, or refused by name. Items of the input and tools are checked where they are translated
(``responses_conversation``). docs/reference/api.md lists every field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator

from k2cli.server.client_request import AnswerOptions, reasoning_variables
from k2cli.server.dialects.answer_formats import response_format
from k2cli.server.dialects.body import Body
from k2cli.server.dialects.exact_literals import Off, Zero
from k2cli.server.dialects.shared_fields import (
    MAX_MESSAGES,
    Objects,
    ReasoningEffort,
)
from k2cli.server.dialects.tool_choices import openai_tool_choice

_NOTHING_IS_STORED = "nothing is stored here: send the whole conversation as 'input'"


def _input(value: Any) -> str | list[dict[str, Any]]:
    """Return a text or a list of items, whose members are checked by the translation."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be a text or a list of items")
    if not 0 < len(value) <= MAX_MESSAGES:
        raise ValueError(f"has {len(value)} items; at least 1 and at most {MAX_MESSAGES} work")
    return value


_InputItems = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
Input = Annotated[
    str | list[dict[str, Any]], PlainValidator(_input, json_schema_input_type=str | _InputItems)
]
Refused = Annotated[Any, WithJsonSchema({"type": "null"})]


class _Ignored(Body):
    """Fields that concern storage, caching, telemetry or speed, and not the answer."""

    access_programs: Any = None
    client_metadata: Any = None
    include: Any = None
    max_tool_calls: Any = None  # it counts calls of OpenAI's own tools
    metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    stream_options: Any = None
    user: Any = None


class ReasoningOptions(Body):
    """The object ``reasoning``. Reasoning is returned whole, so kinds of summaries are ignored."""

    effort: ReasoningEffort | None = None
    context: Any = None
    generate_summary: Any = None
    summary: Any = None


class TextOptions(Body):
    """The object ``text``."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesBody(_Ignored):
    """Body of ``POST /v1/responses``."""

    input: Input
    model: str | None = None
    instructions: str | None = None
    tools: Objects | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Zero | None = None
    truncation: Literal["disabled"] | None = None
    background: Off | None = None
    stream: bool | None = None
    conversation: Refused = None
    previous_response_id: Refused = None
    prompt: Refused = None

    @field_validator("conversation", "previous_response_id", "prompt")
    @classmethod
    def _not_stored(cls, value: Any) -> Any:
        raise ValueError(_NOTHING_IS_STORED)

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables for the chat template; see ``TemplatedBody.template_arguments``."""
        arguments = reasoning_variables(self.reasoning.effort if self.reasoning else None)
        if self.text and self.text.verbosity is not None:
            arguments["verbosity"] = self.text.verbosity
        return arguments

    @property
    def answer_options(self) -> AnswerOptions:
        """Options for generating the answer.

        Raises:
            ApiError: 400 if the format of the answer or the choice of tools is not understood.
        """
        wanted = self.text.format if self.text else None
        echoed = {"text": {"format": wanted}} if wanted else {}
        if self.tool_choice is not None:
            echoed["tool_choice"] = self.tool_choice
        return AnswerOptions(
            model=self.model,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=bool(self.stream),
            parallel_calls=self.parallel_tool_calls is not False,
            answer_format=response_format(wanted, "text.format"),
            tool_choice=openai_tool_choice(self.tool_choice),
            echoed=echoed,
        )
