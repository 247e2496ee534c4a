"""Conversations in the form that a model's chat template reads.

Clients send OpenAI's form. Templates differ from it, and from each other: some iterate the
arguments of a tool call, which clients send as JSON text; some have other names for the reasoning
effort or for earlier reasoning; K2's shows the ids of tool calls, which must have the form that the
model was trained on; that of Kimi K2.5 wants the tools in TypeScript, too.
A template that would leave something out without a word is refused instead.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from k2cli.errors import K2Error
from k2cli.models.text.chat_template import ChatTemplate
from k2cli.models.text.literal_markers import LiteralMarkers
from k2cli.models.text.typescript_tools import sorted_deeply, typescript_declarations

ArgumentForm = Literal["text", "mapping", "mapping or text", "as sent"]
Turn = dict[str, Any]

_NEEDLE, _VALUE, _ID = "k2needlename", "k2needlevalue", "k2needleid"
_JSON = re.compile(rf'"{_NEEDLE}"\s*:\s*"{_VALUE}"')
# The member of an object that stands for arguments that are none.
_RAW_ARGUMENTS = "raw_arguments"
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object"}}}
# What K2's templates write before the id of a call; the models continue these ids.
_K2_CALL = "<|tool_call_begin|>"
_K2_ID = re.compile(r"functions\.[^:\s]+:\d+")
# What the template of Kimi K2.5 reads the declarations of tools from.
_TYPESCRIPT = "tools_ts_str"
# Names under which templates read an assistant's reasoning; clients' own is made the first.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_SPLITS_THOUGHT = re.compile(r"split\(\s*['\"]</think>")
_SWITCH = re.compile(r"(enable_|use_|is_)?(thinking|reasoning)(_enabled|_mode)?")
# A private-use character: no template and no conversation has it, and no filter changes it.
_END_MARK = "\uf8ffk2-answer-continues-here\uf8ff"


class ConversationRenderer:
    """Renders conversations in OpenAI's form by a template, whose habits it finds out.

    Args:
        template: the model's chat template.
        markers: control tokens, which stay text where a client has written them.
    """

    def __init__(self, template: ChatTemplate, markers: LiteralMarkers | None = None) -> None:
        self._template = template
        self._markers = markers or LiteralMarkers()

    def render(
        self,
        turns: Sequence[Turn],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
        continue_last: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Render the prompt as text.

        Args:
            turns: the conversation.
            tools: the tools that the model may call.
            add_generation_prompt: end with the beginning of an answer.
            continue_last: the last turn is the beginning of the answer, which is not ended.
            variables: variables of the template.

        Raises:
            K2Error: if the template rejects the messages, or would leave a part of them out.
        """
        shown = self._adapted(turns, continue_last=continue_last)
        shown = [self._markers.separated_turn(t) if isinstance(t, dict) else t for t in shown]
        tools = self._markers.separated(tools)
        own_names = self._with_own_names(variables)
        if tools and _TYPESCRIPT in self._template.variables:
            # The model's own code sorts the tools, also where it shows them as JSON.
            tools = sorted_deeply(tools)
            if (declared := typescript_declarations(tools)) is not None:
                own_names.setdefault(_TYPESCRIPT, declared)

        def rendered(turns: list[Turn]) -> str:
            if continue_last:
                return self._continued(turns, tools, own_names)
            return self._template.render(turns, tools, add_generation_prompt, own_names)

        try:
            return rendered(shown)
        except K2Error:
            joined = _with_one_system_turn(shown)
            if joined == shown:
                raise
            # The first refusal is the one to report if there is another reason, too.
            with contextlib.suppress(K2Error):
                return rendered(joined)
            raise

    @property
    def shows_tools(self) -> bool:
        """True if the template shows the tools of a request to the model."""
        return "tools" in self._template.variables

    @cached_property
    def argument_form(self) -> ArgumentForm:
        """The form in which the template wants tool arguments, by a call rendered both ways.

        Text is kept where the template writes it as it is, since that repeats what the model
        generated, and finds it in the prefix cache. A template that has another form for a mapping
        than JSON (Kimi K3) gets a mapping, as that is the form in which the model writes, and text
        only if it is no JSON object. ``as sent`` if neither form is shown.
        """
        text = self._rendered_call(json.dumps({_NEEDLE: _VALUE})) or ""
        mapping = self._rendered_call({_NEEDLE: _VALUE}) or ""
        takes_mapping = _NEEDLE in mapping and _VALUE in mapping
        if f'{{"{_NEEDLE}": "{_VALUE}"}}' in text:
            return "text" if not takes_mapping or _JSON.search(mapping) else "mapping or text"
        return "mapping" if takes_mapping else "as sent"

    @cached_property
    def shows_k2_ids(self) -> bool:
        """True if the template writes the ids of tool calls as K2's does."""
        if _K2_CALL not in self._template.source:
            return False
        return _ID in (self._rendered_call("{}") or "")

    def _rendered_call(self, arguments: Any) -> str | None:
        function = {"name": "probe", "arguments": arguments}
        call = {"id": _ID, "type": "function", "function": function}
        turns: list[Turn] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "b", "tool_call_id": _ID, "name": "probe"},
        ]
        for shown in (turns, turns[:-1]):  # some templates refuse a result, or a call without one
            try:
                return self._template.render(shown, [_PROBE_TOOL], False, {})
            except K2Error:
                continue
        return None

    def _adapted(self, turns: Sequence[Turn], *, continue_last: bool) -> list[Turn]:
        turns = self._with_reasoning(turns, continue_last=continue_last)
        if not any(isinstance(turn, dict) and turn.get("tool_calls") for turn in turns):
            return list(turns)
        if "tool_calls" not in self._template.members:
            message = "the model's chat template shows no tool calls, and these messages have some"
            raise K2Error(message)
        result = _with_arguments(turns, self.argument_form)
        return _with_k2_ids(result) if self.shows_k2_ids else result

    def _with_reasoning(self, turns: Sequence[Turn], *, continue_last: bool) -> list[Turn]:
        """Give earlier reasoning to the template under its own name; it decides what it shows.

        Clients that know no reasoning send it back within the content, between the tags of most
        models. A template that reads it apart, and does not look for the tags itself, would write
        tags twice, or reasoning into a turn from which it drops it.
        """
        splits = _SPLITS_THOUGHT.search(self._template.source) is not None
        name = next((name for name in _REASONING if name in self._template.members), None)
        result: list[Turn] = []
        for turn in turns:
            if not isinstance(turn, dict) or turn.get("role") != "assistant":
                result.append(turn)
                continue
            if name is not None and not splits and not (continue_last and turn is turns[-1]):
                turn = _with_thoughts_apart(turn)
            if name is not None and _REASONING[0] in turn:
                turn = {**turn, name: turn[_REASONING[0]]}
            result.append(turn)
        return result

    def _with_own_names(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Add the names that this template has for the reasoning effort and for its switch.

        Kimi K3 reads ``thinking_effort`` where others read ``reasoning_effort``. Names that are
        given keep their values.
        """
        effort = variables.get("reasoning_effort")
        if effort is None:
            return dict(variables)
        names = self._template.variables - set(variables)
        found: dict[str, Any] = {name: effort for name in names if "effort" in name}
        found |= {name: effort != "none" for name in names if _SWITCH.fullmatch(name)}
        return found | dict(variables)

    def _continued(
        self,
        turns: Sequence[Turn],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
    ) -> str:
        *before, last = turns
        marked = [*before, {**last, "content": last["content"] + _END_MARK}]
        text = self._template.render(marked, tools, False, variables)
        if text.count(_END_MARK) != 1:
            raise K2Error("the model's chat template cannot continue an assistant's message")
        return text[: text.index(_END_MARK)]


def _with_one_system_turn(turns: Sequence[Turn]) -> list[Turn]:
    """Join all system turns to one at the beginning, with blank lines between them.

    Agents send several, and some in the middle; Qwen 3.5's template and others refuse both.
    """
    if not all(isinstance(turn, dict) for turn in turns):
        return list(turns)
    texts = [turn["content"] for turn in turns if turn.get("role") == "system"]
    if not texts:
        return list(turns)
    others = [turn for turn in turns if turn.get("role") != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


def _with_thoughts_apart(turn: Turn) -> Turn:
    content = turn.get("content")
    if not isinstance(content, str) or _REASONING[0] in turn:
        return turn
    found = _THOUGHT.fullmatch(content)
    return turn if found is None else {**turn, "content": found[2], _REASONING[0]: found[1]}


# --- the members of tool calls --------------------------------------------------------------------


def _with_arguments(turns: Sequence[Turn], form: ArgumentForm) -> list[Turn]:
    def of_call(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict) or form == "as sent":
            return call
        arguments = function.get("arguments")
        if form != "text" and isinstance(arguments, str):
            arguments = _object_in(arguments, arguments if form == "mapping or text" else None)
        elif form != "text" and arguments is None:
            arguments = {}
        elif form == "text" and isinstance(arguments, dict | list):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        turn
        if not turn.get("tool_calls")
        else {
            **turn,
            "tool_calls": [of_call(call) for call in turn["tool_calls"]],
        }
        for turn in turns
    ]


def _object_in(text: str, other: str | None) -> dict[str, Any] | str:
    """Parse arguments; a call without any is often sent as an empty text.

    A model sometimes writes arguments that are no JSON object. A refusal would end the
    conversation for good, since clients send the call back each time. So the model is shown what it
    wrote: as ``other``, or in an object.
    """
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    return {_RAW_ARGUMENTS: text} if other is None else other


def _with_k2_ids(turns: Sequence[Turn]) -> list[Turn]:
    """Replace ids of other forms by ``functions.NAME:INDEX``, counted through the conversation.

    Source: the guide to tool calls in the repository moonshotai/Kimi-K2-Instruct of the Hub.
    """
    renamed: dict[str, str] = {}
    result: list[Turn] = []
    count = 0
    ids = [call.get("id") for turn in turns for call in turn.get("tool_calls") or ()]
    taken = {known for known in ids if isinstance(known, str)}
    for turn in turns:
        calls = turn.get("tool_calls")
        if calls:
            shown = []
            for call in calls:
                known = call.get("id")
                function = call.get("function")
                name = function.get("name", "") if isinstance(function, dict) else ""
                if not isinstance(known, str) or not _K2_ID.fullmatch(known):
                    while (fresh := f"functions.{name}:{count}") in taken:
                        count += 1
                    if isinstance(known, str):
                        renamed[known] = fresh
                    call = {**call, "id": fresh}
                count += 1
                shown.append(call)
            turn = {**turn, "tool_calls": shown}
        elif turn.get("tool_call_id") in renamed:
            turn = {**turn, "tool_call_id": renamed[turn["tool_call_id"]]}
        result.append(turn)
    return result
