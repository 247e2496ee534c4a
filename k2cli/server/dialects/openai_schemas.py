"""Request bodies of the HTTP API, as pydantic models.

Types and ranges are checked here, so that nothing malformed ever reaches a rank. There are three
kinds of fields: those that k2 uses; those of OpenAI's API that do not change the answer, which are
accepted and ignored (``_Ignored``); all others, which are refused by name, since silently ignoring
an option would give a wrong answer. ``null`` means absent, as in OpenAI's API.
docs/reference/api.md lists every field of OpenAI's with its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    field_validator,
)

from k2cli.server.client_request import AnswerOptions, Conversation, reasoning_variables
from k2cli.server.dialects.answer_formats import FormatFields
from k2cli.server.dialects.body import Body
from k2cli.server.dialects.exact_literals import CacheUse, Off, One
from k2cli.server.dialects.openai_messages import Functions, Message, Messages
from k2cli.server.dialects.shared_fields import MAX_STOP_LETTERS, ReasoningEffort, Thinking
from k2cli.server.dialects.tool_choices import openai_tool_choice, shows_tools
from k2cli.server.errors import invalid

MAX_STOP_STRINGS = 4
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 16_384
_TEMPLATE_RESERVED = frozenset(
    {"self", "messages", "tools", "add_generation_prompt", "continue_last"}
)


class _Ignored(Body):
    """Fields of OpenAI's API, and one of vLLM's, that do not change what this server computes."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    return_token_ids: Any = None  # of vLLM; its load programs count by usage if no ids come


def _stop_strings(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"must be a string or a list of up to {MAX_STOP_STRINGS} strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"has {len(stops)} strings; the maximum is {MAX_STOP_STRINGS}")
    if "" in stops:
        raise ValueError("a stop string must not be empty")
    if any(len(stop) > MAX_STOP_LETTERS for stop in stops):
        raise ValueError(f"a stop string may have {MAX_STOP_LETTERS} letters")
    return stops


def _prompt(value: Any) -> str | list[int]:
    """Return a string or token ids; accept a list that holds one of these."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if all(type(token) is int for token in value):
            return value
        if all(isinstance(item, str | list) for item in value):
            raise ValueError(f"has {len(value)} prompts; a request can have only one")
    raise ValueError("must be a string or a list of token ids")


def _one_answer(value: int) -> int:
    if value != 1:
        raise ValueError(
            f"{value} is not supported, only 1: send the request several times at the same time "
            "instead; the answers are computed together, and the prompt as a rule once"
        )
    return value


def _string_keys_to_ids(value: Any) -> Any:
    """Convert the keys of a JSON object to integers."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise ValueError(f"has {len(value)} members, and the most are {MAX_BIASES}")
    if not all(key.isdecimal() and len(key) < 10 for key in value):
        raise ValueError("its keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


Bias = Annotated[float, Field(ge=-100, le=100)]
# What clients may send, for the OpenAPI document.
_StopsInput = str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None
_PromptInput = str | list[int] | list[str] | list[list[int]]
_BiasesInput = Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None

StopStrings = Annotated[
    list[str], PlainValidator(_stop_strings, json_schema_input_type=_StopsInput)
]
Prompt = Annotated[str | list[int], PlainValidator(_prompt, json_schema_input_type=_PromptInput)]
Biases = Annotated[
    dict[int, Bias] | None,
    BeforeValidator(_string_keys_to_ids, json_schema_input_type=_BiasesInput),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Body):
    """Stream options. ``include_progress`` adds k2's objects with queue and prefill progress."""

    include_usage: bool | None = None
    include_progress: bool | None = None
    include_obfuscation: Any = None


class Extensions(Body):
    """The request's ``"k2"`` object.

    ``cache`` False bypasses the prefix cache; ``"memory"`` keeps what the request leaves in memory
    alone, also in a run with ``--prefix-cache-disk``. ``ignore_stop_tokens`` True generates past
    the model's stop tokens, up to ``max_tokens``, for benchmarks. ``speculation`` False verifies no
    drafts.
    """

    cache: CacheUse | None = None
    ignore_stop_tokens: bool | None = None
    speculation: bool | None = None


class GenerationBody(_Ignored, FormatFields):
    """Fields that chat and plain completions share."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopStrings = Field(default_factory=list)
    n: Annotated[int, AfterValidator(_one_answer)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=10)] | None = None
    logit_bias: Biases = None
    k2: Extensions | None = None

    def options(self, **members: Any) -> AnswerOptions:
        """Return the options of the answer; ``members`` are of the route's own fields.

        Raises:
            ApiError: 400 if the format of the answer is not understood.
        """
        extensions, stream_options = self.k2 or Extensions(), self.stream_options or StreamOptions()
        shared = AnswerOptions(
            model=self.model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            stops=self.stop,
            stream=bool(self.stream),
            wants_usage=bool(stream_options.include_usage),
            wants_progress=bool(stream_options.include_progress),
            use_prefix_cache=extensions.cache is not False,
            stores_prefix=extensions.cache != "memory",
            ignore_stop_tokens=bool(extensions.ignore_stop_tokens),
            use_speculation=extensions.speculation is not False,
            answer_format=self.answer_format,
        )
        return replace(shared, **members)


class TemplatedBody(Body):
    """Fields that change how the chat template renders a conversation."""

    tools: Functions | None = None
    # Fields of vLLM, for an assistant's last message that is the beginning of the answer.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    # The switches of the servers of Moonshot and Z.ai, and of Alibaba, for their models.
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if taken := _TEMPLATE_RESERVED & set(value or ()):
            raise ValueError(f"'{min(taken)}' cannot be set here")
        return value

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables for the chat template, which ignores those that it does not use.

        ``chat_template_kwargs`` takes precedence.
        """
        thinks = self.enable_thinking
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
        arguments = reasoning_variables(self.reasoning_effort, thinks)
        if self.verbosity is not None:
            arguments["verbosity"] = self.verbosity
        return arguments | (self.chat_template_kwargs or {})

    def conversation_of(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> Conversation:
        """Return the conversation for the chat template."""
        return Conversation(
            [message.for_template() for message in messages],
            tools,
            self.template_arguments,
            continue_last=self.continue_final_message,
            add_generation_prompt=self.add_generation_prompt,
        )


class ChatCompletionBody(GenerationBody, TemplatedBody):
    """Body of ``POST /v1/chat/completions``.

    The chat template shows ``tools`` to the model. A ``tool_choice`` does not change the prompt,
    so that the cache of the conversation stays; only "none" leaves the tools out.
    """

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # A field of vLLM.
    include_reasoning: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def conversation(self) -> Conversation:
        """The conversation, without tools if the model may not call any."""
        return self.conversation_of(
            self.messages, self.tools if shows_tools(self.tool_choice) else None
        )

    @property
    def answer_options(self) -> AnswerOptions:
        """Options for generating the answer.

        Raises:
            ApiError: 400 if ``top_logprobs`` is given without ``logprobs``, or the format of the
                answer or the choice of tools is not understood.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        limit = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.options(
            max_tokens=limit,
            logprobs=logprobs,
            parallel_calls=self.parallel_tool_calls is not False,
            include_reasoning=self.include_reasoning is not False,
            tool_choice=openai_tool_choice(self.tool_choice),
        )


class CompletionBody(GenerationBody):
    """Body of ``POST /v1/completions``: one prompt, as text or as token ids."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: One | None = None
    echo: Off | None = None
    suffix: Literal[""] | None = None

    @property
    def answer_options(self) -> AnswerOptions:
        """Options for generating the answer."""
        return self.options(logprobs=self.logprobs)


class TokenizeBody(TemplatedBody):
    """Body of ``POST /v1/tokenize``: either messages or a prompt."""

    model: str | None = None
    messages: Messages | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
