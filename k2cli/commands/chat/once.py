"""One question of ``k2 chat -p`` or of a pipe: its answer, with calls of tools that are allowed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from k2cli.units import clean_text, one_line

if TYPE_CHECKING:
    from k2cli.chat.session import ChatSession
    from k2cli.chat.tools import ToolBox
    from k2cli.client.answers import StreamEvent


@dataclass(slots=True)
class OneShot:
    """One question, and the tools that may be called for it.

    Attributes:
        calls: what was called, for the document of ``--json``.
    """

    session: ChatSession
    tools: ToolBox
    calls: list[dict[str, Any]] = field(default_factory=list)

    def turn_on(self, names: Sequence[str]) -> None:
        """Switch servers on.

        Raises:
            K2Error: if one cannot be used.
        """
        from k2cli.chat.interrupts import noted_interrupts
        from k2cli.chat.tools import cannot_call
        from k2cli.ui.output import note, warn

        if not names:
            return
        with noted_interrupts() as noted:
            notes = self.tools.turn_on(names, lambda: noted.came)
        for text in notes:
            note(text)
        if self.session.model.tools is False:
            warn(cannot_call(self.session.model))
        self.tools.check_allowed_names()
        self.session.tools = self.tools.definitions()

    def answer(self, question: str) -> None:
        """Stream the answer to stdout."""
        from k2cli.chat.figures import figures_line
        from k2cli.ui.chat.stream import dim_note

        self._stream(question, with_text=True)
        if self.session.answer is not None:
            dim_note(figures_line(self.session.answer))

    def answer_by_schema(self, question: str) -> None:
        """Print an answer once it is whole and obeys the schema; meanwhile show its progress."""
        from k2cli.chat.figures import figures_line
        from k2cli.ui.chat.stream import dim_note
        from k2cli.ui.output import print_json

        self._stream(question, with_text=False)
        if (answer := self.session.answer) is not None:
            # A carriage return in valid JSON is whitespace; print_json would escape it.
            print_json(answer.text.strip().replace("\r", " ").encode())
            dim_note(figures_line(answer))

    def _stream(self, question: str, *, with_text: bool) -> None:
        """Show the reasoning and the progress of an answer as it arrives, and its text if asked."""
        from k2cli.chat.waiting import Waiting
        from k2cli.client.answers import Delta, ReasoningDelta
        from k2cli.ui.chat.answer_view import AnswerView

        for stream in self._rounds(question):
            waiting = Waiting()
            markdown = self.session.schema is None
            view = AnswerView(waiting.status, waiting.thought, markdown=markdown)
            try:
                with closing(stream) as events:
                    for event in events:
                        waiting.update(event)
                        if isinstance(event, ReasoningDelta):
                            view.reasoning_text(event.text)
                        elif isinstance(event, Delta) and with_text:
                            view.answer_text(event.text)
            finally:
                view.end()

    def answer_as_json(self, question: str) -> None:
        """Print answer and statistics as one JSON document."""
        from k2cli.chat.figures import answer_document
        from k2cli.chat.session import Answer
        from k2cli.errors import K2Error
        from k2cli.ui.output import print_json

        session = self.session
        name, parsed = session.model.name, session.schema is not None
        calls = self.calls if session.tools else None
        try:
            for stream in self._rounds(question):
                with closing(stream) as events:
                    for _ in events:
                        pass
        except K2Error as error:
            # A partial answer is still useful, and the exit status shows that it is incomplete.
            answer = session.answer or Answer()
            print_json(answer_document(name, answer, error.message, parsed=parsed, calls=calls))
            raise
        print_json(answer_document(name, session.answer or Answer(), parsed=parsed, calls=calls))

    def _rounds(self, question: str) -> Iterator[Generator[StreamEvent]]:
        from k2cli.chat.tool_turns import rounds
        from k2cli.ui.output import note

        return rounds(self.session, self.session.ask(question), self._answer_calls, note)

    def _answer_calls(self) -> bool:
        """Make the calls of the last answer.

        Raises:
            KeyboardInterrupt: if the user stops it.
        """
        from k2cli.chat.tool_turns import RefuseOthers, answer_calls
        from k2cli.ui.output import note

        session = self.session
        calls, before = session.open_calls, len(session.turns)
        if not answer_calls(session, self.tools, _Notes(), RefuseOthers(note)):
            raise KeyboardInterrupt
        for call, turn in zip(calls, session.turns[before:], strict=True):
            self.calls.append(
                {"name": call.name, "arguments": call.arguments, "result": turn["content"]}
            )
        return True


class _Notes:
    """Calls as lines on stderr."""

    def call(self, text: str) -> None:
        from k2cli.ui.output import note

        note(f"tool: {one_line(text)}")

    def result(self, text: str, *, failed: bool) -> None:
        from k2cli.ui.output import note

        for line in clean_text(text).split("\n"):
            note(f"| {line}")

    def note(self, text: str) -> None:
        from k2cli.ui.output import note

        note(text)

    @contextmanager
    def working(self, status: Callable[[], str]) -> Iterator[None]:
        yield
