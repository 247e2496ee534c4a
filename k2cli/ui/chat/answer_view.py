"""View of one answer: the waiting before it, its reasoning, and its text."""

from __future__ import annotations

from collections.abc import Callable

from k2cli.ui.chat.stream import AnswerWriter, ReasoningWriter, StatusLine, dim_note


class AnswerView:
    """Shows one answer as it arrives.

    Args:
        status: describes what the server does now; asked again while nothing arrives.
        thought: describes the reasoning once it is over; "" if there was none.
        show_reasoning: True to show the text of the reasoning, too.
        markdown: False to show the answer as it is.
    """

    def __init__(
        self,
        status: Callable[[], str],
        thought: Callable[[], str],
        *,
        show_reasoning: bool = False,
        markdown: bool = True,
    ) -> None:
        self._status_text = status
        self._thought = thought
        self._show_reasoning = show_reasoning
        self._status = StatusLine()
        self._reasoning = ReasoningWriter()
        self._writer = AnswerWriter(markdown=markdown)
        self._reasoned = False
        self._status.show(status)

    def reasoning_text(self, text: str) -> None:
        """Show more of the reasoning."""
        self._reasoned = True
        if self._show_reasoning:
            self._status.clear()
            self._reasoning.write(text)

    def answer_text(self, text: str) -> None:
        """Show more of the answer."""
        self._end_reasoning()
        output = self._writer.render(text)
        if self._writer.beside_status:
            self._writer.put(output)
            return
        if output:
            self._status.clear()
            self._writer.put(output)
        if part := self._writer.waiting_for:
            self._status.show(lambda: f"{part} · {self._status_text()}")

    def end(self) -> None:
        """End the answer, which may be complete or not."""
        self._status.clear()
        self._end_reasoning()
        self._writer.finish()

    def _end_reasoning(self) -> None:
        if not self._reasoned:
            return
        self._reasoned = False
        self._reasoning.finish()
        if not self._show_reasoning and (text := self._thought()):
            self._status.clear()
            dim_note(text)
