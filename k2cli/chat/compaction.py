"""Summaries of conversations that have become long.

The model writes the summary. A conversation that fits into the context is summarized at once, so
that its cache is used; a longer one in parts, each together with the summary of those before it.
"""

from __future__ import annotations

from typing import Any

from k2cli.chat.budget import TokenCount, count_prompt, estimate_tokens
from k2cli.chat.session import ChatSession
from k2cli.errors import K2Error

Turns = list[dict[str, Any]]

INSTRUCTION = (
    "Summarize our conversation so that you can continue it from the summary alone. Keep what was "
    "asked and decided, facts, names, numbers, paths, code that is still needed, and open "
    "questions. Write only the summary."
)
_BEFORE = "Summary of our conversation so far:"
_AGREED = "I have the summary. Let us continue."
_PART_SHARE = 0.6
"""Share of the context that a part may fill; the rest is for the summaries."""
_ANSWER_SHARE = 0.1
"""Share of the context that must be left for a summary made at once."""


def summary_turns(summary: str) -> Turns:
    """Return the turns with which a conversation continues after a summary."""
    return [
        {"role": "user", "content": f"{_BEFORE}\n\n{summary}"},
        {"role": "assistant", "content": _AGREED},
    ]


def parts_to_summarize(session: ChatSession) -> list[Turns]:
    """Divide the turns of a conversation into parts whose summaries fit into the context.

    Raises:
        K2Error: if there is nothing to summarize, or a turn alone does not fit.
    """
    if not session.turns:
        raise K2Error("there is no conversation to summarize")
    length = session.model.context_length
    whole = [*session.messages(), {"role": "user", "content": INSTRUCTION}]
    if length is None or count_prompt(session, whole).tokens <= length * (1 - _ANSWER_SHARE):
        return [session.turns]
    return _divided(session.turns, int(length * _PART_SHARE))


def _divided(turns: Turns, room: int) -> list[Turns]:
    parts: list[Turns] = []
    part: Turns = []
    used = 0
    for question, *answers in _exchanges(turns):
        exchange = [question, *answers]
        tokens = sum(estimate_tokens(turn["content"]) for turn in exchange)
        if tokens > room:
            raise K2Error(
                f"a question and its answer have {TokenCount(tokens, exact=False)}, too many to "
                f"summarize in {room:,}",
                "/save FILE.md keeps the conversation, /clear begins a new one",
            )
        if part and used + tokens > room:
            parts.append(part)
            part, used = [], 0
        part += exchange
        used += tokens
    return [*parts, part]


def _exchanges(turns: Turns) -> list[Turns]:
    """Divide turns before each question."""
    found: list[Turns] = []
    for turn in turns:
        if turn["role"] == "user" or not found:
            found.append([])
        found[-1].append(turn)
    return found
