"""Requests independent of the dialect: the conversation, and options of the answer.

The dialects translate their bodies to these values, and ``engine_request`` turns them into what
the engine gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation for the chat template.

    Attributes:
        turns: messages in OpenAI's form; see ``models.text.conversation_renderer``.
        tools: tools in OpenAI's form (``{"type": "function", "function": {...}}``) that the model
            may call, or None.
        variables: variables of the chat template.
        namespaces: see ``OutputOptions``.
        continue_last: True if the last turn is the beginning of the answer, False if it is not;
            None lets its form decide.
        add_generation_prompt: False for a prompt that does not end with the beginning of an answer;
            None lets the last turn decide.
        field: the name of the messages in the client's dialect, for errors.
        tool_places: the place of each tool's schema in the client's body, for errors; none for
            that of OpenAI's Chat.
    """

    turns: Sequence[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    namespaces: Mapping[str, str] = field(default_factory=dict)
    continue_last: bool | None = None
    add_generation_prompt: bool | None = None
    field: str = "messages"
    tool_places: Sequence[str] = ()


def reasoning_variables(effort: str | None, thinks: bool | None = None) -> dict[str, Any]:
    """Return the variables by which chat templates switch reasoning, and set its effort.

    The switch is ``thinking`` in the templates of Kimi K2.5 and DeepSeek V3.1, ``enable_thinking``
    in those of Qwen3 and GLM 4.5. The renderer adds names that other templates have.

    Args:
        effort: the client's word for the effort; "none" for no reasoning, None if it gave none.
        thinks: the client's switch; without one, any effort but "none" switches reasoning on.
    """
    if effort is None and thinks is None:
        return {}
    if thinks is None:
        thinks = effort != "none"
    variables: dict[str, Any] = {"thinking": thinks, "enable_thinking": thinks}
    if not thinks:
        effort = "none"
    return variables if effort is None else variables | {"reasoning_effort": effort}


FormatKind = Literal["json_object", "json_schema", "regex", "lark", "gbnf", "choice"]


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """The form that a client wants its answer to have.

    Attributes:
        kind: how ``value`` is to be understood.
        value: a JSON schema for ``json_schema``; a pattern, a grammar's text or a list of texts for
            ``regex``, ``lark`` and ``gbnf``, ``choice``; None for ``json_object``.
        field: the place of the value in the client's body, for errors.
        strict: False to leave out what cannot be held of a schema, instead of refusing it.
    """

    kind: FormatKind
    value: Any = None
    field: str = "response_format"
    strict: bool = True


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Choice of the tools that the model must or may call.

    Attributes:
        required: True if the answer must consist of calls.
        names: the only tools that may be called; None for all of the request.
        field: the place in the client's body, for errors.
    """

    required: bool = False
    names: tuple[str, ...] | None = None
    field: str = "tool_choice"


class OutputOptions(msgspec.Struct, frozen=True):
    """Options for splitting the text of an answer into reasoning, answer and calls.

    Attributes:
        parsed: False for text that is returned as the model wrote it (plain completions).
        tools: the tools that the model was shown, in OpenAI's form; None if it was shown none or
            may not call any, and then markers of calls are ordinary text.
        parallel_calls: False if the answer ends after its first call.
        begins_in_reasoning: True if the prompt ends within reasoning, as templates do that open it.
        include_reasoning: False if the client wants the answer without its reasoning.
        namespaces: the namespace of each tool that has one, by the name of the tool.
        obeys_format: True if the answer's text obeys a format, so that calls are only what begins
            with a marker of calls.
    """

    parsed: bool = False
    tools: list[dict[str, Any]] | None = None
    parallel_calls: bool = True
    begins_in_reasoning: bool = False
    include_reasoning: bool = True
    namespaces: dict[str, str] = {}
    obeys_format: bool = False


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """Options for generating and sending an answer. None means the default of the served model.

    Attributes:
        model: the name in the request, which must be the served model's or an alias.
        max_tokens: the limit of the answer; it is cut to the room that the context has.
        top_k: -1 or 0 for off.
        seed: for the same text again.
        logprobs: the number of alternatives per token, or None for no log-probabilities.
        stops: strings that end the answer.
        stream, wants_usage, wants_progress: see ``EngineRequest``.
        use_prefix_cache, stores_prefix, ignore_stop_tokens, use_speculation: the request's
            ``"k2"`` object.
        parallel_calls, include_reasoning: see ``OutputOptions``.
        answer_format: the form of the answer's text; None for any text.
        tool_choice: by default the model decides. Tools with ``"strict": true`` in their function
            are called with arguments that obey their schema in either case.
        echoed: members of the request that the answer repeats.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stops: Sequence[str] = ()
    stream: bool = False
    wants_usage: bool = False
    wants_progress: bool = False
    use_prefix_cache: bool = True
    stores_prefix: bool = True
    ignore_stop_tokens: bool = False
    use_speculation: bool = True
    parallel_calls: bool = True
    include_reasoning: bool = True
    answer_format: AnswerFormat | None = None
    tool_choice: ToolChoice = ToolChoice()
    echoed: Mapping[str, Any] = field(default_factory=dict)
