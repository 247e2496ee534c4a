"""Answers as responses of OpenAI's Responses API, whole or as a stream of numbered events.

An answer is a list of items: reasoning, messages and calls, in the order of the model's text.
Items of nothing but white space are left out.
"""

from __future__ import annotations

from typing import Any, Literal

from k2cli.protocol import PromptProgress
from k2cli.server.dialects.writer import SSE_COMMENT, AnswerContext, BlankStart, sse_event
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

ItemKind = Literal["reasoning", "message", "function_call"]
_PREFIXES: dict[ItemKind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class ResponsesWriter:
    """Writer of the objects of ``/v1/responses``."""

    keep_alive = SSE_COMMENT

    def __init__(self, context: AnswerContext) -> None:
        self._context = context
        self._sequence = 0
        self._started = False
        self._items: list[dict[str, Any]] = []
        self._kind: ItemKind | None = None
        self._text: list[str] = []
        self._call: dict[str, Any] = {}
        self._blank = BlankStart()

    # --- the stream -------------------------------------------------------------------------------

    def idle(self, event: Idle) -> bytes:
        return self._start()

    def progress(self, event: PromptProgress) -> bytes:
        return self._start()

    def step(self, event: Step) -> bytes:
        return self._start() + b"".join(map(self._part, event.events))

    def end(self, event: Ended) -> bytes:
        cut = event.finish_reason == "length"
        closed = self._start() + self._close("incomplete" if cut else "completed")
        response = self._response(self._items, event)
        return closed + self._event(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> bytes:
        response = self._response(self._items, None) | {
            "status": "failed",
            "error": {"code": error.code or "server_error", "message": error.message},
        }
        return self._start() + self._event("response.failed", response=response)

    def _event(self, kind: str, **members: Any) -> bytes:
        numbered = {"type": kind, "sequence_number": self._sequence, **members}
        self._sequence += 1
        return sse_event(kind, numbered)

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        response = self._response([], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _part(self, event: OutputEvent) -> bytes:
        match event:
            case ReasoningText(text=text):
                return self._add("reasoning", text)
            case AnswerText(text=text):
                return self._add("message", text)
            case CallBegan(call_id=call_id, name=name):
                closed = self._close("completed")
                self._call = {"call_id": call_id, "name": name}
                return closed + self._open("function_call")
            case CallArguments(text=text):
                return self._more(text)
            case CallEnded():
                return self._close("completed")

    def _add(self, kind: ItemKind, text: str) -> bytes:
        if self._kind == kind:
            self._blank.clear()
            return self._more(text) if text else b""
        if not (text := self._blank.add(kind, text)):
            return b""
        return self._close("completed") + self._open(kind) + self._more(text)

    def _open(self, kind: ItemKind) -> bytes:
        self._kind, self._text = kind, []
        item = self._item(kind, len(self._items), "", "in_progress", self._call)
        index = len(self._items)
        added = self._event("response.output_item.added", output_index=index, item=item)
        if kind == "function_call":
            return added
        return added + self._place_event("response.content_part.added", part=_part_of(kind, ""))

    def _more(self, text: str) -> bytes:
        self._text.append(text)
        match self._kind:
            case "message":
                return self._place_event("response.output_text.delta", delta=text, logprobs=[])
            case "reasoning":
                return self._place_event("response.reasoning_text.delta", delta=text)
            case _:
                return self._call_event("response.function_call_arguments.delta", delta=text)

    def _close(self, status: str) -> bytes:
        kind = self._kind
        self._blank.clear()
        if kind is None:
            return b""
        # What the item says that is done must have been sent: no arguments are an empty object.
        begun = b""
        if kind == "function_call" and not self._text and status == "completed":
            begun = self._more("{}")
        text = "".join(self._text)
        item = self._item(kind, len(self._items), text, status, self._call)
        match kind:
            case "message":
                done = self._place_event("response.output_text.done", text=text, logprobs=[])
            case "reasoning":
                done = self._place_event("response.reasoning_text.done", text=text)
            case "function_call":
                members = {"arguments": item["arguments"], "name": item["name"]}
                done = self._call_event("response.function_call_arguments.done", **members)
        if kind != "function_call":
            done += self._place_event("response.content_part.done", part=_part_of(kind, text))
        index = len(self._items)
        done += self._event("response.output_item.done", output_index=index, item=item)
        self._items.append(item)
        self._kind = None
        return begun + done

    def _place_event(self, event: str, **members: Any) -> bytes:
        return self._call_event(event, content_index=0, **members)

    def _call_event(self, event: str, **members: Any) -> bytes:
        assert self._kind is not None
        index = len(self._items)
        item_id = self._item_id(self._kind, index)
        return self._event(event, item_id=item_id, output_index=index, **members)

    # --- objects ----------------------------------------------------------------------------------

    def whole(self, blocks: Blocks, ended: Ended) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        closed = False
        for block in blocks.blocks:
            index, call = len(items), {}
            if isinstance(block, CallBlock):
                kind: ItemKind = "function_call"
                text, call = block.arguments, {"call_id": block.call_id, "name": block.name}
            else:
                kind = "reasoning" if isinstance(block, ReasoningBlock) else "message"
                text = block.text
                if not text.strip():
                    continue
            closed = isinstance(block, CallBlock) and block.complete
            items.append(self._item(kind, index, text, "completed", call))
        # The stream ends an item that is open then; a call that is complete is not.
        if items and ended.finish_reason == "length" and not closed:
            items[-1]["status"] = "incomplete"
        return self._response(items, ended)

    def error_object(self, error: ApiError) -> dict[str, Any]:
        return error.body()

    def _item_id(self, kind: ItemKind, index: int) -> str:
        return f"{_PREFIXES[kind]}_{self._context.request_id}_{index}"

    def _item(
        self, kind: ItemKind, index: int, text: str, status: str, call: dict[str, Any]
    ) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(kind, index), "type": kind, "status": status}
        begun = status == "in_progress"
        match kind:
            case "message":
                parts = [] if begun else [_part_of(kind, text)]
                return {**item, "role": "assistant", "content": parts}
            case "reasoning":
                parts = [] if begun else [_part_of(kind, text)]
                return {**item, "summary": [], "content": parts, "encrypted_content": None}
            case "function_call":
                # A call without arguments is an object without members.
                arguments = text or ("" if begun or status == "incomplete" else "{}")
                namespace = self._context.request.output.namespaces.get(call["name"])
                within = {} if namespace is None else {"namespace": namespace}
                return {**item, **call, **within, "arguments": arguments}

    def _response(self, items: list[dict[str, Any]], ended: Ended | None) -> dict[str, Any]:
        request = self._context.request
        status, details = "in_progress", None
        if ended is not None:
            cut = ended.finish_reason == "length"
            status = "incomplete" if cut else "completed"
            details = {"reason": "max_output_tokens"} if cut else None
        return {
            "id": f"resp_{self._context.request_id}",
            "object": "response",
            "created_at": self._context.created,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "instructions": None,
            "max_output_tokens": request.generate.max_tokens,
            "metadata": {},
            "model": self._context.model,
            "output": list(items),
            "parallel_tool_calls": request.output.parallel_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": request.generate.sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto" if request.output.tools else "none",
            "tools": [],
            "top_p": request.generate.sampling.top_p,
            "truncation": "disabled",
            "usage": None if ended is None else _usage(ended.usage),
            **request.echoed,
        }


def _part_of(kind: ItemKind, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(used: AnswerUsage) -> dict[str, Any]:
    members: dict[str, Any] = {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }
    if used.finished is not None:
        members["timings"] = timings(used.finished)
    return members
