"""Request bodies of Anthropic's Messages API, as pydantic models.

As in OpenAI's (``openai_schemas``), a field is used, or accepted and ignored because the answer is
the same without it (``_Ignored``), or refused by name. Contents of messages are checked where they
are translated (``anthropic_conversation``). docs/reference/api.md lists every field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
)

from k2cli.server.client_request import AnswerOptions, reasoning_variables
from k2cli.server.dialects.answer_formats import json_schema_format, only_format
from k2cli.server.dialects.body import Body
from k2cli.server.dialects.shared_fields import MAX_MESSAGES, MAX_STOP_LETTERS, Objects, Thinking
from k2cli.server.dialects.tool_choices import anthropic_tool_choice
from k2cli.server.errors import type_named

MAX_BLOCKS = 16_384
MAX_EDITS = 64
MAX_STOP_SEQUENCES = 64
_FORMAT = "output_config.format"


class _Ignored(Body):
    """Fields that concern billing, caching, telemetry or speed, and not the answer."""

    betas: Any = None
    billing_policy: Any = None
    cache_control: Any = None
    diagnostics: Any = None
    fallback_credit_token: Any = None
    fallbacks: Any = None
    inference_geo: Any = None
    metadata: Any = None
    service_tier: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


def _content(value: Any) -> str | list[dict[str, Any]]:
    """Return a text or a list of blocks, whose members are checked by the translation."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(block, dict) for block in value):
        raise ValueError("must be a string or a list of content blocks")
    if len(value) > MAX_BLOCKS:
        raise ValueError(f"has {len(value)} blocks, and the most are {MAX_BLOCKS}")
    return value


_ContentInput = str | Annotated[list[dict[str, Any]], Field(max_length=MAX_BLOCKS)]
Content = Annotated[
    str | list[dict[str, Any]], PlainValidator(_content, json_schema_input_type=_ContentInput)
]


class AnthropicMessage(BaseModel):
    """One message. Other members, which clients echo back, are ignored.

    ``clear_at`` "next_user_message" hides a system message once a message of the user follows it.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["user", "assistant", "system"]
    content: Content
    clear_at: Literal["next_user_message", "never"] | None = None
    output_config: dict[str, Any] | None = None

    @field_validator("output_config")
    @classmethod
    def _empty(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value:
            raise ValueError("is supported for the whole request only")
        return value


class OutputConfig(Body):
    """Options of the output. Budgets are refused."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class ToolChoice(Body):
    """Freedom of the model to call tools."""

    type: str
    name: Any = None
    disable_parallel_tool_use: bool | None = None


class ContextManagement(Body):
    """Edits of the context. Nothing is cleared, which loses no text; compaction is refused."""

    edits: list[dict[str, Any]] = Field(default_factory=list, max_length=MAX_EDITS)

    @field_validator("edits")
    @classmethod
    def _only_clearing(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for edit in value:
            kind = edit.get("type")
            if not isinstance(kind, str) or not kind.startswith("clear_"):
                raise ValueError(f"an edit that {type_named(kind)} is not supported")
        return value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LETTERS)]


class MessagesBody(_Ignored):
    """Body of ``POST /v1/messages`` and of ``POST /v1/messages/count_tokens``."""

    model: str | None = None
    messages: Annotated[
        list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    system: Content | None = None
    tools: Objects | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # The name of ``output_config.format`` while it was a beta.
    output_format: dict[str, Any] | None = None
    context_management: ContextManagement | None = None
    mcp_servers: list[Any] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stop_sequences: list[Stop] = Field(default_factory=list, max_length=MAX_STOP_SEQUENCES)
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None

    @field_validator("mcp_servers")
    @classmethod
    def _none_of_them(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("this server connects to no other servers")
        return value

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables for the chat template: switches of reasoning, and its effort.

        An effort without ``thinking`` is one of a model that thinks.
        """
        effort = self.output_config.effort if self.output_config else None
        thinks = None if self.thinking is None else self.thinking.type != "disabled"
        return reasoning_variables(effort, thinks)

    @property
    def answer_options(self) -> AnswerOptions:
        """Options for generating the answer.

        Raises:
            ApiError: 400 if the format of the answer or the choice of tools is not understood.
        """
        chosen = self.tool_choice
        formats = (
            json_schema_format(self.output_config.format if self.output_config else None, _FORMAT),
            json_schema_format(self.output_format, "output_format"),
        )
        return AnswerOptions(
            model=self.model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stops=self.stop_sequences,
            stream=bool(self.stream),
            parallel_calls=not (chosen and chosen.disable_parallel_tool_use),
            answer_format=only_format(formats),
            tool_choice=anthropic_tool_choice(
                chosen.type if chosen else None, chosen.name if chosen else None
            ),
        )
