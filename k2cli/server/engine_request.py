"""Make the engine's request from a parsed body: prompt tokens, sampling, limits.

All checks that need the model or the tokenizer are made here, before the engine gets the request.
Routes call these functions in a thread, because encoding a long prompt takes time.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from k2cli.errors import K2Error
from k2cli.protocol import Generate, Sampling
from k2cli.server.errors import ApiError, invalid
from k2cli.server.schemas import (
    ChatCompletionBody,
    CompletionBody,
    GenerationBody,
    Message,
    TemplatedBody,
    TokenizeBody,
)
from k2cli.server.served_model import ServedModel
from k2cli.server.text import TokenTextStream


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
    """

    generate: Generate
    stops: list[str] = []
    stream: bool = False
    wants_usage: bool = False
    wants_progress: bool = False
    limit_was_cut: bool = False


def check_model(name: str | None, served: ServedModel) -> None:
    """Check that a request names the served model, or none. No model is loaded on request.

    Raises:
        ApiError: 404 for any other name.
    """
    if name is not None and name != served.name:
        message = f"the model '{name}' is not served here; the served model is '{served.name}'"
        raise ApiError(404, message, param="model", code="model_not_found")


def chat_request(
    body: ChatCompletionBody, tokenizer: ServerTokenizer, served: ServedModel
) -> EngineRequest:
    """Make the engine's request from the body of a chat completion.

    Raises:
        ApiError: with status 400 or 404.
    """
    check_model(body.model, served)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    tools = None if body.tool_choice == "none" else body.tools
    text = conversation_text(body.messages, tools, body, tokenizer)
    prompt = _encode(text, "messages", tokenizer, served.context_length)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _build(body, prompt, "messages", limit, logprobs, tokenizer, served)


def completion_request(
    body: CompletionBody, tokenizer: ServerTokenizer, served: ServedModel
) -> EngineRequest:
    """Make the engine's request from the body of a plain completion.

    Raises:
        ApiError: with status 400 or 404.
    """
    check_model(body.model, served)
    if isinstance(body.prompt, str):
        prompt = _encode(
            body.prompt, "prompt", tokenizer, served.context_length, add_special_tokens=True
        )
    else:
        prompt = body.prompt
        _check_token_ids(prompt, "prompt", tokenizer.vocabulary_size)
    return _build(body, prompt, "prompt", body.max_tokens, body.logprobs, tokenizer, served)


def tokenize_body(body: TokenizeBody, tokenizer: ServerTokenizer, served: ServedModel) -> list[int]:
    """Return the token ids of a conversation or a text.

    Raises:
        ApiError: with status 400 or 404.
    """
    check_model(body.model, served)
    if (body.messages is None) == (body.prompt is None):
        raise invalid("give either messages or a prompt", "messages")
    most = max(served.context_length, MAX_COUNTED_TOKENS)
    if body.prompt is not None:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return _encode(body.prompt, "prompt", tokenizer, most, add_special_tokens=special)
    text = conversation_text(body.messages or [], body.tools, body, tokenizer)
    return _encode(text, "messages", tokenizer, most)


def conversation_text(
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    body: TemplatedBody,
    tokenizer: ServerTokenizer,
) -> str:
    """Apply the chat template.

    Raises:
        ApiError: 400 if there is no template, or it refuses these messages or knows no tools.
    """
    turns = [message.for_template() for message in messages]
    continues = _continues(messages[-1], body)
    prompted = not continues and body.add_generation_prompt is not False
    try:
        if tools and not tokenizer.shows_tools:
            message = "the chat template of this model knows no tools, so it would not see them"
            raise invalid(message, "tools")
        return tokenizer.chat_prompt(
            turns,
            tools,
            add_generation_prompt=prompted,
            continue_last=continues,
            **body.template_arguments,
        )
    except K2Error as error:
        raise invalid(error.message, "messages") from error


def _continues(last: Message, body: TemplatedBody) -> bool:
    """Return True if the last message is the beginning of the answer.

    Raises:
        ApiError: 400 if that is asked for, and it cannot be.
    """
    possible = last.role == "assistant" and bool(last.content) and not last.tool_calls
    if body.continue_final_message and not possible:
        message = "the last message is not an assistant's text, so there is nothing to continue"
        raise invalid(message, "continue_final_message")
    if body.continue_final_message and body.add_generation_prompt:
        message = "an answer is continued or begun anew, not both"
        raise invalid(message, "add_generation_prompt")
    if body.continue_final_message is None:
        return possible and not body.add_generation_prompt
    return body.continue_final_message


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
    body: GenerationBody,
    prompt: list[int],
    prompt_param: str,
    max_tokens: int | None,
    logprobs: int | None,
    tokenizer: ServerTokenizer,
    served: ServedModel,
) -> EngineRequest:
    budget = _token_budget(len(prompt), max_tokens, prompt_param, served.context_length)
    _check_token_ids(list(body.logit_bias or ()), "logit_bias", tokenizer.vocabulary_size)
    stop_tokens = [] if body.extensions.ignore_stop_tokens else sorted(tokenizer.stop_tokens)
    generate = Generate(
        request_id=uuid.uuid4().hex,
        prompt=prompt,
        max_tokens=budget,
        sampling=_sampling(body, logprobs, served),
        stop_tokens=stop_tokens,
        use_prefix_cache=body.extensions.cache is not False,
    )
    limit_was_cut = max_tokens is not None and budget < max_tokens
    return EngineRequest(
        generate,
        body.stop,
        bool(body.stream),
        body.wants_usage,
        body.wants_progress,
        limit_was_cut,
    )


def _sampling(body: GenerationBody, logprobs: int | None, served: ServedModel) -> Sampling:
    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    # Other servers take -1 as "off".
    top_k = served.default_top_k if body.top_k is None else max(body.top_k, 0)
    temperature = given(body.temperature, served.default_temperature)
    return Sampling(
        temperature=0.0 if temperature < LEAST_TEMPERATURE else temperature,
        top_p=max(given(body.top_p, served.default_top_p), LEAST_TOP_P),
        top_k=top_k,
        min_p=given(body.min_p, 0.0),
        seed=body.seed,
        repetition_penalty=given(body.repetition_penalty, 1.0),
        presence_penalty=given(body.presence_penalty, 0.0),
        frequency_penalty=given(body.frequency_penalty, 0.0),
        logit_bias=body.logit_bias or {},
        top_logprobs=logprobs,
    )
