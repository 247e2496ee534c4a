"""``k2 chat`` on a terminal, beside a run whose rank writes K2-Thinking's format."""

from __future__ import annotations

import pytest

from tests.clients.script import LONG, THOUGHT
from tests.support.terminal import Terminal

pytestmark = [pytest.mark.ranks, pytest.mark.shared_state]


def test_a_chat_with_a_model_that_thinks(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    with Terminal("chat", "--url", url) as terminal:
        terminal.prompt()
        terminal.enter("How warm is it?")
        terminal.expect("I have no thermometer.")
        terminal.expect("of reasoning)")
        terminal.prompt()
        assert "No tool." not in terminal.text
        terminal.expect("scripted · context")
        terminal.enter("/thinking")
        terminal.expect("No tool.")
        terminal.prompt()
        terminal.enter(LONG)
        terminal.expect("1, 2, ")
        terminal.type("\x03")
        terminal.expect("stopped")
        terminal.prompt()
        terminal.enter("/clear")
        terminal.prompt()
        terminal.enter("And now?")
        terminal.expect("I have no thermometer.", 2)
        terminal.prompt()
        terminal.type("\x04")
        assert terminal.close() == 0
    assert THOUGHT not in terminal.text
