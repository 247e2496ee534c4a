"""Answers as messages of Anthropic's API, whole or as a stream of named events.

A stream begins when the engine starts with the prompt, because its first event says how many tokens
come from the cache; until then, and while a prompt is computed, it has ``ping`` events. Blocks of
nothing but white space are left out: clients send them back, and Anthropic's API refuses them.
"""

from __future__ import annotations

import json
from typing import Any

from k2cli.protocol import PromptProgress
from k2cli.server.dialects.anthropic_ids import client_id
from k2cli.server.dialects.error_responses import anthropic_error
from k2cli.server.dialects.writer import AnswerContext, BlankStart, sse_event
from k2cli.server.errors import ApiError
from k2cli.server.generation import Ended, Idle, Step
from k2cli.server.output.events import (
    AnswerText,
    Blocks,
    CallArguments,
    CallBegan,
    CallBlock,
    CallEnded,
    OutputEvent,
    ReasoningBlock,
    ReasoningText,
)
from k2cli.server.usage import AnswerUsage, timings

SIGNATURE = "k2-does-not-sign-reasoning"
"""The signature of all reasoning. Clients want one, and k2 takes any back, because it reads the
text itself."""

RAW_ARGUMENTS = "raw_arguments"
"""Member of a call's input that has the model's text, if that is not a JSON object."""

_DELTAS = {"thinking": "thinking_delta", "text": "text_delta"}


class MessagesWriter:
    """Writer of the objects of ``/v1/messages``.

    Args:
        context: what is known before the answer.
        request_id: the id that the response's header has.
    """

    keep_alive = sse_event("ping", {"type": "ping"})

    def __init__(self, context: AnswerContext, request_id: str) -> None:
        self._context = context
        self._request_id = request_id
        self._started = False
        self._index = -1
        self._open: str | None = None
        self._blank = BlankStart()
        self._wraps: bool | None = None

    # --- the stream -------------------------------------------------------------------------------

    def idle(self, event: Idle) -> bytes:
        return b""

    def progress(self, event: PromptProgress) -> bytes:
        return self._start(event.cached)

    def step(self, event: Step) -> bytes:
        return self._start(0) + b"".join(map(self._part, event.events))

    def end(self, event: Ended) -> bytes:
        reason, stop = self._stop_reason(event)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        ending = {"type": "message_delta", "delta": delta, "usage": _usage(event.usage)}
        return (
            self._start(event.usage.cached_tokens)
            + self._close()
            + sse_event("message_delta", ending)
            + sse_event("message_stop", {"type": "message_stop"})
        )

    def error(self, error: ApiError) -> bytes:
        return sse_event("error", self.error_object(error))

    def _start(self, cached_tokens: int) -> bytes:
        if self._started:
            return b""
        self._started = True
        used = _token_counts(len(self._context.request.generate.prompt), cached_tokens, 0)
        message = self._message([], None, None, used)
        return sse_event("message_start", {"type": "message_start", "message": message})

    def _part(self, event: OutputEvent) -> bytes:
        match event:
            case ReasoningText(text=text):
                return self._text("thinking", text)
            case AnswerText(text=text):
                return self._text("text", text)
            case CallBegan(call_id=call_id, name=name):
                block = self._call(call_id, name, {})
                closed, self._wraps = self._close(), None
                return closed + self._begin("tool_use", block)
            case CallArguments(text=text):
                return self._input_delta(self._wrapped(text))
            case CallEnded():
                return self._close()

    def _wrapped(self, text: str) -> str:
        """Return arguments to send; those that do not begin like an object become a member of one.

        The SDKs read the arguments as JSON while they arrive, and fail on anything else.
        """
        begins = self._wraps is None
        if self._wraps is None and text:
            self._wraps = not text.startswith("{")
        if not self._wraps:
            return text
        escaped = json.dumps(text, ensure_ascii=False)[1:-1]
        return f'{{"{RAW_ARGUMENTS}": "{escaped}' if begins else escaped

    def _input_delta(self, text: str) -> bytes:
        return self._delta({"type": "input_json_delta", "partial_json": text})

    def _text(self, kind: str, text: str) -> bytes:
        if self._open == kind:
            self._blank.clear()
            return self._delta({"type": _DELTAS[kind], kind: text}) if text else b""
        if not (text := self._blank.add(kind, text)):
            return b""
        block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        begun = self._close() + self._begin(kind, block)
        return begun + self._delta({"type": _DELTAS[kind], kind: text})

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        self._open = kind
        self._index += 1
        return self._block_event("content_block_start", content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return self._block_event("content_block_delta", delta=delta)

    def _close(self) -> bytes:
        kind, self._open = self._open, None
        self._blank.clear()
        if kind is None:
            return b""
        last = b""
        if kind == "thinking":
            last = self._delta({"type": "signature_delta", "signature": SIGNATURE})
        elif kind == "tool_use" and self._wraps:
            last = self._input_delta('"}')
        return last + self._block_event("content_block_stop")

    def _block_event(self, name: str, **members: Any) -> bytes:
        return sse_event(name, {"type": name, "index": self._index, **members})

    # --- whole answers ----------------------------------------------------------------------------

    def whole(self, blocks: Blocks, ended: Ended) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for block in blocks.blocks:
            if isinstance(block, CallBlock):
                content.append(self._call(block.call_id, block.name, _input(block.arguments)))
                continue
            kind = "thinking" if isinstance(block, ReasoningBlock) else "text"
            if content and content[-1]["type"] == kind:
                content[-1][kind] += block.text
            elif block.text.strip():
                signed = {"signature": SIGNATURE} if kind == "thinking" else {}
                content.append({"type": kind, kind: block.text, **signed})
        return self._message(content, *self._stop_reason(ended), _usage(ended.usage))

    def error_object(self, error: ApiError) -> dict[str, Any]:
        return anthropic_error(error, self._request_id)

    def _message(
        self,
        content: list[dict[str, Any]],
        stop_reason: str | None,
        stop_sequence: str | None,
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "id": f"msg_{self._context.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._context.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage,
        }

    def _call(self, call_id: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
        known = client_id(call_id, self._context.request_id)
        return {"type": "tool_use", "id": known, "name": name, "input": given}

    @staticmethod
    def _stop_reason(ended: Ended) -> tuple[str, str | None]:
        match ended.finish_reason:
            case "tool_calls":
                return "tool_use", None
            case "length":
                # The context ended the answer if it has no room for what the client asked.
                full = ended.usage.max_tokens is not None
                return "model_context_window_exceeded" if full else "max_tokens", None
            case "stop" if ended.stop_string is not None:
                return "stop_sequence", ended.stop_string
            case "stop":
                return "end_turn", None


def _input(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call as the object that Anthropic's form wants."""
    if not arguments.strip():
        return {}
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {RAW_ARGUMENTS: arguments}


def _token_counts(prompt: int, cached: int, generated: int) -> dict[str, Any]:
    """Return the counts in Anthropic's definition: ``input_tokens`` has those computed only."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }


def _usage(used: AnswerUsage) -> dict[str, Any]:
    members = _token_counts(used.prompt_tokens, used.cached_tokens, used.completion_tokens)
    members["output_tokens_details"] = {"thinking_tokens": used.reasoning_tokens}
    if used.max_tokens is not None:
        members["max_tokens"] = used.max_tokens
    if used.finished is not None:
        members["timings"] = timings(used.finished)
    return members
