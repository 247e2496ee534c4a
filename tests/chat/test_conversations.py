"""Conversations on disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k2cli.chat.conversations import (
    Conversation,
    ConversationStore,
    Turn,
    api_turns,
    as_markdown,
    automatic_name,
    title_of,
    turns_of,
)
from k2cli.errors import K2Error


def conversation(name: str, *texts: str) -> Conversation:
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return Conversation(name, title_of(texts[0]), "toy", 1e9, 1e9, turns)


def test_a_conversation_comes_back_as_it_was(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path / "chats")
    saved = conversation("a", "Größe? 中文\n\n```", "x\x1b[2J")
    saved.turns[1].reasoning_content = "Hm."
    store.save(saved)
    assert ConversationStore(tmp_path / "chats").load("a") == saved
    assert stat.S_IMODE((tmp_path / "chats").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "chats" / "a.json").stat().st_mode) == 0o600
    assert as_markdown(saved).endswith("## You\n\nGröße? 中文\n\n```\n\n## toy\n\nx\x1b[2J\n")


@pytest.mark.parametrize("time", ["1e300", "-1e300", "1e14", "-1"])
def test_a_time_without_a_date_is_damage(tmp_path: Path, time: str) -> None:
    store = ConversationStore(tmp_path)
    store.save(conversation("a", "Hi"))
    path = tmp_path / "a.json"
    text = path.read_text().replace("1000000000.0", time)
    assert text.count(time) == 2
    path.write_text(text)
    with pytest.raises(K2Error, match="cannot be read"):
        ConversationStore(tmp_path).load("a")
    assert not list(store.search())


def test_what_another_chat_wrote_is_not_replaced(tmp_path: Path) -> None:
    first, second = ConversationStore(tmp_path), ConversationStore(tmp_path)
    tmp_path.chmod(0o700)
    first.save(conversation("a", "first"))
    other = second.load("a")
    other.turns.append(Turn("assistant", "from the second"))
    second.save(other)
    list(first.search())  # looking at it does not make it one's own
    mine = conversation("a", "first", "from the first")
    first.save(mine)
    assert mine.name == "a-2"
    assert second.load("a").turns[-1].content == "from the second"
    first.save(mine)
    assert sorted(first.names()) == ["a", "a-2"]


def test_search_and_names(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    store = ConversationStore(tmp_path)
    store.save(conversation("zebra-1", "Stripes?", "Black and WHITE"))
    store.save(conversation("zebra-2", "Hooves?"))
    for name in ("broken.json", "notes.txt", "..json", "-x.json"):
        (tmp_path / name).write_text("{")
    assert [each.name for each in store.search("white")] == ["zebra-1"]
    assert store.load("zebra-2").title == "Hooves?"
    for name in ("zebra", "lion", "../zebra-1", ""):
        with pytest.raises(K2Error, match="conversation"):
            store.load(name)
    with pytest.raises(K2Error, match=r"broken\.json"):
        store.load("broken")


def test_rename(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    store = ConversationStore(tmp_path)
    one = conversation("a", "x")
    store.save(one)
    store.save(conversation("b", "y"))
    for name in ("b", "../c", "", "a b"):
        with pytest.raises(K2Error):
            store.rename(one, name)
    store.rename(one, "c")
    assert sorted(store.names()) == ["b", "c"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "chats").write_text("a file")
    with pytest.raises(K2Error, match="cannot be saved in"):
        ConversationStore(tmp_path / "chats").save(conversation("a", "x"))


def test_automatic_names() -> None:
    assert automatic_name("What is the Capital of France, please?", 1e9).endswith(
        "-what-is-the-capital-of"
    )
    assert automatic_name("巴黎在哪里", 1e9).endswith("-chat")
    assert title_of("\n\n  first line  \nsecond") == "first line"


def test_calls_and_results_are_exported() -> None:
    call = {
        "id": "a:0",
        "type": "function",
        "function": {"name": "time__now", "arguments": '{"zone": "UTC"}'},
    }
    turns = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a:0", "content": "```\nnow\n```\n"},
        {"role": "assistant", "content": "Now."},
    ]
    saved = Conversation("n", "When?", "toy", 0.0, 0.0, turns_of(turns))
    text = as_markdown(saved)
    assert (
        '## toy\n\n```\ntime__now {"zone": "UTC"}\n```\n\n## Result\n\n````\n```\nnow\n```\n````'
        in text
    )
    assert api_turns(saved.turns) == turns


def test_a_conversation_that_is_renamed_while_they_are_listed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, scandir = ConversationStore(tmp_path), os.scandir
    for name in "ab":
        store.save(conversation(name, "Hi"))

    @contextmanager
    def scandir_before_it(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = list(entries)
        (tmp_path / "a.json").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", scandir_before_it)
    assert store.names() == ["b"]
