"""Make the engine's request from what a client asks: prompt tokens, sampling, limits.

All checks that need the model or the tokenizer are made here, before the engine gets the request.
Routes call these functions in a thread, because encoding a long prompt takes time.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from k2cli.errors import K2Error
from k2cli.protocol import Generate, Grammar, Sampling
from k2cli.server.client_request import AnswerOptions, Conversation, OutputOptions
from k2cli.server.errors import ApiError, invalid
from k2cli.server.served_model import ServedModel
from k2cli.server.structured.request_grammar import Prompted, request_grammar
from k2cli.server.text_assembler import TokenTextStream


class ServerTokenizer(Protocol):
    """The part of ``models.text.tokenizer.Tokenizer`` that the server uses."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The token ids that end an answer."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """The upper bound of token ids, exclusive."""
        ...

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of plain text."""
        ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        ...

    def encode_within(
        self, text: str, max_tokens: int, add_special_tokens: bool = False
    ) -> list[int] | None:
        """Encode a text; None may stand for one that has more tokens than that."""
        ...

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        **template_arguments: Any,
    ) -> str:
        """Render a conversation in the model's chat template."""
        ...

    @property
    def shows_tools(self) -> bool:
        """True if the chat template shows the tools of a request to the model."""
        ...

    def stream(self) -> TokenTextStream:
        """Make a detokenizer for one answer."""
        ...


LEAST_TEMPERATURE = 1e-6
"""Below this the best token is chosen: logits divided by less overflow in float32."""

LEAST_TOP_P = 1e-6
"""Keeps the best token only; smaller values are 0 in float32, which keeps none."""

MAX_COUNTED_TOKENS = 2**20
"""Tokens up to which ``/v1/tokenize`` counts, whatever the context."""


class EngineRequest(msgspec.Struct, frozen=True):
    """A request that is fit for the engine, and how its client wants the answer.

    Attributes:
        generate: what the engine is asked.
        stops: stop strings, which the engine never sees.
        stream: True if the answer is to be streamed.
        wants_usage: True if the stream is to end with a usage chunk.
        wants_progress: True if the stream is to carry ``"k2"`` objects.
        limit_was_cut: True if the context has less room than the client's ``max_tokens``.
        output: how the answer's text is split.
        model: the name that the client asked for, which its answer names; None for the model's own.
        echoed: members of the client's request that the answer repeats.
    """

    generate: Generate
    stops: list[str] = []
    stream: bool = False
    wants_usage: bool = False
    wants_progress: bool = False
    limit_was_cut: bool = False
    output: OutputOptions = OutputOptions()
    model: str | None = None
    echoed: dict[str, Any] = {}


def check_model(name: str | None, served: ServedModel) -> None:
    """Check that a request names the served model, an alias of it, or none. None is loaded for it.

    Raises:
        ApiError: 404 for any other name.
    """
    if name is not None and name not in served.names:
        message = (
            f"the model '{name}' is not served here; the served model is '{served.name}' "
            "(k2 launch --alias adds names)"
        )
        raise ApiError(404, message, param="model", code="model_not_found")


def conversation_request(
    conversation: Conversation,
    options: AnswerOptions,
    tokenizer: ServerTokenizer,
    served: ServedModel,
) -> EngineRequest:
    """Make the engine's request for the next turn of a conversation.

    Raises:
        ApiError: with status 400 or 404.
    """
    check_model(options.model, served)
    text = conversation_text(conversation, tokenizer)
    prompt = _encode(text, conversation.field, tokenizer, served.context_length)
    continued = conversation.turns[-1]["content"] if _continues(conversation) else None
    output = OutputOptions(
        True,
        conversation.tools,
        options.parallel_calls,
        begins_in_reasoning=served.output_format.begins_in_reasoning(text, continued),
        include_reasoning=options.include_reasoning,
        namespaces=dict(conversation.namespaces),
        obeys_format=options.answer_format is not None,
    )
    prompted = Prompted(text, continued, conversation.tool_places)
    grammar = request_grammar(served.output_format, output, options, prompted)
    return _build(prompt, conversation.field, options, output, grammar, tokenizer, served)


def prompt_request(
    prompt: str | list[int],
    options: AnswerOptions,
    tokenizer: ServerTokenizer,
    served: ServedModel,
) -> EngineRequest:
    """Make the engine's request that continues a text or token ids.

    Raises:
        ApiError: with status 400 or 404.
    """
    check_model(options.model, served)
    if isinstance(prompt, str):
        most = served.context_length
        prompt = _encode(prompt, "prompt", tokenizer, most, add_special_tokens=True)
    else:
        _check_token_ids(prompt, "prompt", tokenizer.vocabulary_size)
    output = OutputOptions()
    grammar = request_grammar(served.output_format, output, options, Prompted())
    return _build(prompt, "prompt", options, output, grammar, tokenizer, served)


def conversation_tokens(
    conversation: Conversation, tokenizer: ServerTokenizer, served: ServedModel
) -> list[int]:
    """Return the token ids of a conversation, to count or show them.

    Raises:
        ApiError: with status 400.
    """
    text = conversation_text(conversation, tokenizer)
    return _encode(text, conversation.field, tokenizer, _most_counted(served))


def text_tokens(
    text: str, add_special_tokens: bool, tokenizer: ServerTokenizer, served: ServedModel
) -> list[int]:
    """Return the token ids of a text, to count or show them.

    Raises:
        ApiError: with status 400.
    """
    most = _most_counted(served)
    return _encode(text, "prompt", tokenizer, most, add_special_tokens=add_special_tokens)


def _most_counted(served: ServedModel) -> int:
    return max(served.context_length, MAX_COUNTED_TOKENS)


def conversation_text(conversation: Conversation, tokenizer: ServerTokenizer) -> str:
    """Apply the chat template.

    Raises:
        ApiError: 400 if there is no template, or it refuses these messages or knows no tools.
    """
    continues = _continues(conversation)
    prompted = not continues and conversation.add_generation_prompt is not False
    try:
        if conversation.tools and not tokenizer.shows_tools:
            message = (
                "the chat template of this model knows no tools, so it would not see them; "
                "leave 'tools' out, or serve a model whose template knows them"
            )
            raise invalid(message, "tools")
        return tokenizer.chat_prompt(
            list(conversation.turns),
            _shown_tools(conversation.tools),
            add_generation_prompt=prompted,
            continue_last=continues,
            **conversation.variables,
        )
    except K2Error as error:
        raise invalid(error.message, conversation.field) from error


def _shown_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tools without ``strict``, which concerns the grammar and not the model."""
    if tools is None:
        return None
    return [
        {**tool, "function": {key: one for key, one in tool["function"].items() if key != "strict"}}
        for tool in tools
    ]


def _continues(conversation: Conversation) -> bool:
    """Return True if the last message is the beginning of the answer.

    Raises:
        ApiError: 400 if that is asked for, and it cannot be.
    """
    last = conversation.turns[-1]
    possible = bool(
        last["role"] == "assistant" and last.get("content") and not last.get("tool_calls")
    )
    if conversation.continue_last and not possible:
        message = "the last message is not an assistant's text, so there is nothing to continue"
        raise invalid(message, "continue_final_message")
    if conversation.continue_last and conversation.add_generation_prompt:
        message = "an answer is continued or begun anew, not both"
        raise invalid(message, "add_generation_prompt")
    if conversation.continue_last is None:
        return possible and not conversation.add_generation_prompt
    return conversation.continue_last


def _encode(
    text: str,
    param: str,
    tokenizer: ServerTokenizer,
    max_tokens: int,
    *,
    add_special_tokens: bool = False,
) -> list[int]:
    try:
        tokens = tokenizer.encode_within(text, max_tokens, add_special_tokens)
    except K2Error as error:
        raise invalid(error.message, param) from error
    if tokens is None:
        message = (
            f"the prompt has more than {max_tokens} tokens, which is the context; "
            "k2 launch --context makes it larger"
        )
        raise invalid(message, param, "context_length_exceeded")
    return tokens


def _check_token_ids(tokens: Sequence[int], param: str, vocabulary_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary_size:
            message = f"{param}: {token} is not a token id; token ids are below {vocabulary_size}"
            raise invalid(message, param)


def _token_budget(
    prompt_tokens: int, asked: int | None, prompt_param: str, context_length: int
) -> int:
    """Compute the number of tokens that may be generated.

    A larger limit is cut to the room that the context has: agents send a constant one (opencode
    32,000), and other local servers do the same. The answer's usage names the limit then.

    Raises:
        ApiError: 400 if the prompt alone fills the context.
    """
    if prompt_tokens == 0:
        raise invalid(f"{prompt_param} has no tokens", prompt_param)
    left = context_length - prompt_tokens
    if left < 1:
        message = (
            f"the prompt has {prompt_tokens} tokens, but the context of {context_length} must hold "
            "the prompt and at least one more token; k2 launch --context makes it larger"
        )
        raise invalid(message, prompt_param, "context_length_exceeded")
    return left if asked is None else min(asked, left)


def _build(
    prompt: list[int],
    prompt_param: str,
    options: AnswerOptions,
    output: OutputOptions,
    grammar: Grammar | None,
    tokenizer: ServerTokenizer,
    served: ServedModel,
) -> EngineRequest:
    asked = options.max_tokens
    budget = _token_budget(len(prompt), asked, prompt_param, served.context_length)
    _check_token_ids(list(options.logit_bias), "logit_bias", tokenizer.vocabulary_size)
    generate = Generate(
        request_id=uuid.uuid4().hex,
        prompt=prompt,
        max_tokens=budget,
        sampling=_sampling(options, served),
        stop_tokens=[] if options.ignore_stop_tokens else sorted(tokenizer.stop_tokens),
        use_prefix_cache=options.use_prefix_cache,
        grammar=grammar,
        use_speculation=options.use_speculation,
        stores_prefix=options.stores_prefix,
    )
    return EngineRequest(
        generate,
        list(options.stops),
        options.stream,
        options.wants_usage,
        options.wants_progress,
        limit_was_cut=asked is not None and budget < asked,
        output=output,
        model=options.model,
        echoed=dict(options.echoed),
    )


def _sampling(options: AnswerOptions, served: ServedModel) -> Sampling:
    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    # Other servers take -1 as "off".
    top_k = served.default_top_k if options.top_k is None else max(options.top_k, 0)
    temperature = given(options.temperature, served.default_temperature)
    return Sampling(
        temperature=0.0 if temperature < LEAST_TEMPERATURE else temperature,
        top_p=max(given(options.top_p, served.default_top_p), LEAST_TOP_P),
        top_k=top_k,
        min_p=given(options.min_p, 0.0),
        seed=options.seed,
        repetition_penalty=given(options.repetition_penalty, 1.0),
        presence_penalty=given(options.presence_penalty, 0.0),
        frequency_penalty=given(options.frequency_penalty, 0.0),
        logit_bias=dict(options.logit_bias),
        top_logprobs=options.logprobs,
    )
