"""The parts of an answer, whatever the model's markers and the client's dialect are.

A parser turns the text of an answer into these events. The dialects write them as their clients
expect, and collect them to blocks for an answer that is not streamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from k2cli.server.text_assembler import Piece, ScoredToken


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """A part of the reasoning before or between answers, and its scored tokens."""

    text: str
    scores: Sequence[ScoredToken] = ()


@dataclass(frozen=True, slots=True)
class AnswerText:
    """A part of the answer itself, and its scored tokens."""

    text: str
    scores: Sequence[ScoredToken] = ()


@dataclass(frozen=True, slots=True)
class CallBegan:
    """A tool call whose name is known. ``index`` counts the calls of an answer from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next letters of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The end of a call. A call that was cut off by the limit of tokens has none."""

    index: int


OutputEvent = ReasoningText | AnswerText | CallBegan | CallArguments | CallEnded


class OutputParser(Protocol):
    """Parser of one answer."""

    @property
    def calls(self) -> int:
        """The number of calls that have begun."""
        ...

    @property
    def reasoning_tokens(self) -> int:
        """The number of generated tokens that belong to reasoning."""
        ...

    def push(self, piece: Piece) -> list[OutputEvent]:
        """Add text and return the events that are now certain."""
        ...

    def finish(self) -> list[OutputEvent]:
        """Return the events of text that was held back, once the answer has ended."""
        ...


class PlainOutput:
    """Parser for models and requests whose output is an answer without any markers."""

    calls = 0
    reasoning_tokens = 0

    def push(self, piece: Piece) -> list[OutputEvent]:
        return [AnswerText(piece.text, piece.scores)] if piece.text or piece.scores else []

    def finish(self) -> list[OutputEvent]:
        return []


# --- blocks of a whole answer ---------------------------------------------------------------------


@dataclass(slots=True)
class ReasoningBlock:
    """Reasoning without an answer or a call between its parts."""

    text: str = ""


@dataclass(slots=True)
class TextBlock:
    """Answer text without a call between its parts."""

    text: str = ""
    scores: list[ScoredToken] = field(default_factory=list)


@dataclass(slots=True)
class CallBlock:
    """A tool call. ``arguments`` is JSON text, or what the model wrote instead."""

    call_id: str
    name: str
    arguments: str = ""
    complete: bool = False


Block = ReasoningBlock | TextBlock | CallBlock


@dataclass(slots=True)
class Blocks:
    """Collector of the events of an answer, in the order of the model's text."""

    blocks: list[Block] = field(default_factory=list)
    _calls: dict[int, CallBlock] = field(default_factory=dict)

    def add(self, events: Sequence[OutputEvent]) -> None:
        """Add the events of a step."""
        for event in events:
            self._add(event)

    def _add(self, event: OutputEvent) -> None:
        match event:
            case ReasoningText(text=text):
                if not self.blocks or not isinstance(self.blocks[-1], ReasoningBlock):
                    self.blocks.append(ReasoningBlock())
                last = self.blocks[-1]
                assert isinstance(last, ReasoningBlock)
                last.text += text
            case AnswerText(text=text, scores=scores):
                if not self.blocks or not isinstance(self.blocks[-1], TextBlock):
                    self.blocks.append(TextBlock())
                last = self.blocks[-1]
                assert isinstance(last, TextBlock)
                last.text += text
                last.scores.extend(scores)
            case CallBegan(index=index, call_id=call_id, name=name):
                self._calls[index] = CallBlock(call_id, name)
                self.blocks.append(self._calls[index])
            case CallArguments(index=index, text=text):
                self._calls[index].arguments += text
            case CallEnded(index=index):
                self._calls[index].complete = True

    @property
    def text(self) -> str:
        """The answer's text, without reasoning and calls."""
        return "".join(block.text for block in self.blocks if isinstance(block, TextBlock))

    @property
    def reasoning(self) -> str:
        """All reasoning of the answer."""
        return "".join(block.text for block in self.blocks if isinstance(block, ReasoningBlock))

    @property
    def scores(self) -> list[ScoredToken]:
        """The scored tokens of the answer's text."""
        return [
            score for block in self.blocks if isinstance(block, TextBlock) for score in block.scores
        ]

    @property
    def calls(self) -> list[CallBlock]:
        """The tool calls."""
        return [block for block in self.blocks if isinstance(block, CallBlock)]
