"""Room of a conversation in the model's context: counts, refusals and the warning at 80 %."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from k2cli.chat.session import ChatSession
from k2cli.errors import K2Error

WARN_SHARE = 0.8
LARGE_CHARACTERS = 2000
"""Characters of a message whose tokens are counted before it is sent."""

_CHARACTERS_PER_TOKEN = 4
"""Of English text and code; of other scripts, a character is counted as a token."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """A number of tokens, counted by the server or estimated."""

    tokens: int
    exact: bool

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens" if self.exact else f"about {self.tokens:,} tokens"


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of a text."""
    ascii_count = len(text) if text.isascii() else sum(character < "\x80" for character in text)
    return -(-ascii_count // _CHARACTERS_PER_TOKEN) + len(text) - ascii_count


def count_prompt(session: ChatSession, messages: list[dict[str, Any]]) -> TokenCount:
    """Count the tokens of a prompt; estimate them if the server is not k2, or does not answer."""
    if session.model.is_k2:
        try:
            return TokenCount(
                session.api.count_tokens(session.model, messages, session.options, session.tools),
                exact=True,
            )
        except K2Error:
            pass  # it is gone, or refuses what its template refuses: the request itself says why
    return TokenCount(sum(estimate_tokens(turn["content"]) for turn in messages), exact=False)


def is_large(session: ChatSession, question: str) -> bool:
    """True if a question is to be counted: it is long, or the context is half full."""
    length, used = session.model.context_length, session.context_tokens or 0
    half_full = length is not None and used + estimate_tokens(question) > length / 2
    return len(question) > LARGE_CHARACTERS or half_full


def check_room(
    session: ChatSession, question: str, hint: str = "/compact, /clear or a shorter message"
) -> TokenCount:
    """Count the tokens of the prompt that a question makes with the conversation before it.

    Args:
        session: the conversation before.
        question: the next message.
        hint: what to do if there is no room; by default what is possible in a conversation.

    Raises:
        K2Error: if the context does not hold them.
    """
    messages = [*session.messages(), {"role": "user", "content": question}]
    counted = count_prompt(session, messages)
    length = session.model.context_length
    # An estimate may be wrong by half; then the server decides.
    if length is not None and counted.tokens >= (length if counted.exact else 2 * length):
        raise K2Error(
            f"the message makes a prompt of {counted}, and the context holds {length:,}; "
            "it was not sent",
            hint,
        )
    return counted


def context_share(session: ChatSession) -> float | None:
    """Return the used share of the context; None if it is not known."""
    length, used = session.model.context_length, session.context_tokens
    return None if not length or used is None else used / length


def context_warning(session: ChatSession) -> str | None:
    """Return a warning if the context is nearly full."""
    share = context_share(session)
    if share is None or share < WARN_SHARE:
        return None
    return (
        f"{share:.0%} of the context is used ({session.context_tokens:,} of "
        f"{session.model.context_length:,} tokens): /compact goes on with a summary"
    )
