"""Turns, counts and summaries of a conversation, with a server that is replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from k2cli.chat.budget import check_room, context_warning, estimate_tokens
from k2cli.chat.calls import ToolCall, close_calls, result_turn, valid_turns
from k2cli.chat.compaction import parts_to_summarize
from k2cli.chat.completion import Completer
from k2cli.chat.conversations import api_turns, turns_of
from k2cli.chat.session import ChatSession
from k2cli.chat.tool_turns import rounds
from k2cli.chat.tools import MOST_ROUNDS
from k2cli.client.answers import CallDelta, Delta, Ended, StreamEvent
from k2cli.client.client import ModelInfo
from k2cli.errors import ClusterError, K2Error


class Api:
    """A server with one script for each request; an exception in it is raised."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.sent: list[list[dict[str, str]]] = []

    def chat(
        self,
        model: Any,
        messages: Any,
        options: Any,
        form: Any = None,
        tools: Any = None,
        *,
        private: bool = False,
    ) -> Iterator[StreamEvent]:
        self.sent.append(list(messages))
        for event in self.scripts.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event

    def count_tokens(self, model: Any, messages: Any, options: Any, tools: Any = None) -> int:
        return sum(len(turn["content"]) for turn in messages)


def answered(text: str) -> list[Any]:
    return [Delta(text), Ended("stop", {"prompt_tokens": 60, "completion_tokens": 25})]


def session(*scripts: list[Any], is_k2: bool = True, length: int | None = 100) -> ChatSession:
    api: Any = Api(*scripts)
    return ChatSession(api, ModelInfo("toy", length, is_k2))


def run(events: Iterator[StreamEvent]) -> None:
    try:
        for _ in events:
            pass
    except K2Error:
        pass


def contents(chat: ChatSession) -> list[str]:
    return [turn["content"] for turn in chat.turns]


def test_nothing_is_lost_when_the_server_is_gone() -> None:
    gone = ClusterError("gone")
    chat = session(answered("one"), [gone], [gone], answered("two"), [gone], [Delta("par"), gone])
    run(chat.ask("first"))
    run(chat.ask("second"))
    assert (contents(chat), chat.unsent) == (["first", "one"], "second")
    run(chat.regenerate())
    assert (contents(chat), chat.unsent) == (["first", "one"], "second")
    run(chat.regenerate())
    assert (contents(chat), chat.unsent) == (["first", "one", "second", "two"], None)
    # A new answer replaces the old one when it begins, not before.
    run(chat.regenerate())
    assert contents(chat) == ["first", "one", "second", "two"]
    run(chat.regenerate())
    assert contents(chat) == ["first", "one", "second", "par"]


def test_undo() -> None:
    chat = session(answered("one"), answered("two"), answered("three"))
    run(chat.ask("first"))
    run(chat.ask("second"))
    assert chat.undo() == "second"
    assert (contents(chat), chat.unsent) == (["first", "one"], "second")
    run(chat.ask("third"))
    assert chat.undo() == "third"
    assert chat.undo() == "first"
    assert chat.undo() is None
    with pytest.raises(K2Error, match="no question"):
        session().regenerate()


def test_room_in_the_context() -> None:
    chat = session(answered("one"))
    assert check_room(chat, "x" * 99).tokens == 99
    with pytest.raises(K2Error, match="a prompt of 100 tokens, and the context holds 100"):
        check_room(chat, "x" * 100)
    with pytest.raises(K2Error) as caught:
        check_room(chat, "x" * 100, "a shorter question")
    assert caught.value.hint == "a shorter question"
    assert context_warning(chat) is None
    run(chat.ask("first"))
    assert (context_warning(chat) or "").startswith("85% of the context is used (85 of 100 tokens)")


def test_an_estimate_is_marked_and_refuses_late() -> None:
    chat = session(is_k2=False)
    assert str(check_room(chat, "x" * 600)) == "about 150 tokens"
    with pytest.raises(K2Error, match="about 200 tokens"):
        check_room(chat, "x" * 800)
    assert str(check_room(session(is_k2=False, length=None), "x" * 8000)) == "about 2,000 tokens"
    assert estimate_tokens("巴黎abcde") == 4


def test_a_summary_in_parts() -> None:
    chat = session(length=1000)
    with pytest.raises(K2Error, match="no conversation"):
        parts_to_summarize(chat)
    for number in range(6):
        chat.turns.append({"role": "user", "content": f"{number}" * 800})
        chat.turns.append({"role": "assistant", "content": "a" * 400})
    parts = parts_to_summarize(chat)
    assert [turn for part in parts for turn in part] == chat.turns
    assert [len(part) for part in parts] == [4, 4, 4]
    assert all(part[0]["role"] == "user" for part in parts)
    chat.turns[0]["content"] = "x" * 4000
    with pytest.raises(K2Error, match="too many to summarize in 600"):
        parts_to_summarize(chat)
    chat.model = ModelInfo("toy", 100_000, True)
    assert parts_to_summarize(chat) == [chat.turns]


def test_completion(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for name in ("src/main.py", "src/map.md", "src/.hidden"):
        (tmp_path / name).touch()
    complete = Completer({"/read": "", "/regen": "", "/set": ""}, {"/load": ["zebra", "lion"]})

    def texts(text: str) -> list[tuple[str, int]]:
        return [(each.text, each.length) for each in complete(text)]

    assert texts("/re") == [("/read", 3), ("/regen", 3)]
    assert texts("/load z") == [("zebra", 1)]
    assert texts("/set temp") == [("temperature", 4)]
    assert texts("/read src/ma") == [("src/main.py", 6), ("src/map.md", 6)]
    assert texts("/read a.py sr") == [("src/", 2)]
    assert texts("why @src/.") == [("src/.hidden", 5)]
    assert texts("me@sr") == texts("hello") == texts("/load\nx") == texts("@nosuch/x") == []


# --- calls of tools -----------------------------------------------------------------------------


def called(*calls: tuple[str, str, str], reason: str = "tool_calls") -> list[Any]:
    deltas = [CallDelta(index, *call) for index, call in enumerate(calls)]
    return [*deltas, Ended(reason, {})]


def test_every_call_has_one_result() -> None:
    chat = session(called(("a", "one", "{}"), ("a", "two", "[1"), ("", "three", "")))
    run(chat.ask("first"))
    assert [(call.call_id, call.name) for call in chat.open_calls] == [
        ("a", "one"), ("two:1", "two"), ("three:2", "three"),
    ]  # fmt: skip
    members = chat.turns[-1]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in members] == [
        {}, {"invalid": "[1"}, {},
    ]  # fmt: skip
    chat.turns.append(result_turn(chat.open_calls[0], "1"))
    assert [call.name for call in chat.open_calls] == ["two", "three"]
    broken = [*chat.turns, {"role": "tool", "tool_call_id": "other", "content": "?"}]
    whole = valid_turns([*broken, {"role": "user", "content": "next"}])
    assert [turn["role"] for turn in whole] == ["user", "assistant", "tool", "tool", "tool", "user"]
    assert valid_turns(whole) == whole
    assert api_turns(turns_of(whole)) == whole


def test_calls_that_are_cut_off_or_go_wrong_are_not_kept() -> None:
    long = [CallDelta(0, "a", "one", "x" * 2**20), CallDelta(0, "", "", "y")]
    many = [CallDelta(index, "", "f", "") for index in range(100)]
    cut = called(("a", "one", '{"x": '), reason="length")
    chat = session(
        cut, [*long, Ended("stop", {})], many, called(("a", "b", "{}")), [ClusterError("x")]
    )
    run(chat.ask("first"))
    assert chat.open_calls == []
    for _ in range(2):
        with pytest.raises(K2Error):
            list(chat.ask("again"))
        assert chat.unsent == "again"
    run(chat.ask("call"))
    chat.turns.append(result_turn(chat.open_calls[0], "1"))
    before = list(chat.turns)
    run(chat.proceed())  # the server is gone: the results stay
    assert (chat.turns, chat.unsent) == (before, None)
    assert chat.undo() == "call"


@pytest.mark.parametrize(
    "text", ['{"a": "\\ud800"}', '{"a": NaN}', "[]", "{", f'{{"a": {"9" * 9999}}}']
)
def test_arguments_that_are_no_object(text: str) -> None:
    assert ToolCall("a", "b", text).parsed() is None
    assert ToolCall("a", "b", '{"a": 123456789012345678901234567890}').parsed()


def test_answers_with_calls_in_a_row_are_bounded() -> None:
    chat = session(*(called(("a", "one", "{}")) for _ in range(MOST_ROUNDS + 5)))
    made, notes = [], list[str]()

    def answer() -> bool:
        made.append(chat.open_calls[0].name)
        close_calls(chat.turns, "result")
        return True

    for events in rounds(chat, chat.ask("go on"), answer, notes.append):
        run(events)
    assert len(made) == MOST_ROUNDS
    assert notes == [f"stopped after {MOST_ROUNDS} answers with calls; write a message to go on"]
    assert chat.open_calls == []
    assert "was not made" in chat.turns[-1]["content"]
