"""Text of an answer as readers of formats consume it: with markers, and before it is complete.

A reader is a generator. It asks a ``Source`` for text up to a marker, and yields wherever the text
so far does not decide. What it does depends on the whole text alone, never on how that was split
into pieces. Each letter is looked at a bounded number of times.

Markers that are special tokens of the model are single letters in here, so that ordinary text never
equals them. These letters are lone surrogates, which no decoder of UTF-8 returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache

from k2cli.server.text_assembler import Piece, held_back

_FIRST_CODE = 0xD800
WHITESPACE = " \t\r\n"

Take = Callable[[str], object]


class MarkerCodes:
    """Letters that stand for special tokens."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        longest_first = sorted(set(texts), key=lambda text: (-len(text), text))
        self._codes = {text: chr(_FIRST_CODE + n) for n, text in enumerate(longest_first)}
        self._texts = {ord(code): text for text, code in self._codes.items()}
        self._any = re.compile(f"[{''.join(self._codes.values())}]") if self._codes else None

    def encode(self, marker: str) -> str:
        """Replace the special tokens in the text of a marker by their letters."""
        for text, code in self._codes.items():
            marker = marker.replace(text, code)
        return marker

    def of_piece(self, piece: Piece) -> str:
        """Replace the markers of a piece by their letters."""
        parts, end = [], 0
        for marker in piece.markers:
            if (code := self._codes.get(marker.text)) is not None:
                parts += [piece.text[end : marker.offset], code]
                end = marker.offset + len(marker.text)
        return "".join(parts) + piece.text[end:]

    def decode(self, text: str) -> str:
        """Replace letters of markers by the markers' own text."""
        return text.translate(self._texts) if self._texts else text

    def without(self, text: str) -> str:
        """Drop letters of markers."""
        return self._any.sub("", text) if self._any else text


@lru_cache(maxsize=512)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, markers), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


@lru_cache(maxsize=512)
def _longest(markers: tuple[str, ...]) -> int:
    return max(map(len, markers), default=0)


class TooLong:
    """Result of reading a text that has to be short and is not."""


TOO_LONG = TooLong()


class Source:
    """Text that arrives in pieces, and is read by one reader.

    Attributes:
        final: True once no more text will come.
        offset: letters that were read, markers counted with their own text.
    """

    def __init__(self, codes: MarkerCodes) -> None:
        self.codes = codes
        self.final = False
        self.offset = 0
        self._text = ""
        self._at = 0

    def add(self, text: str) -> None:
        """Add text in which markers are letters."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def _consume(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        self.offset += len(self.codes.decode(text))
        return text

    def until(
        self,
        markers: tuple[str, ...],
        take: Take,
        *,
        limit: int | None = None,
        coded: bool = False,
    ) -> Generator[None, None, str | TooLong | None]:
        """Give the text before the next marker to ``take``, and read the marker.

        Args:
            markers: texts in which special tokens are letters; the longest one at a place counts.
            take: called with each part of the text that is certain.
            limit: letters after which the text is too long.
            coded: leave the letters of other markers in the text.

        Returns:
            The marker, None at the end of the text, or ``TOO_LONG``.
        """
        pattern, longest = _pattern(markers), _longest(markers)
        left = limit
        while True:
            found = pattern.search(self._text, self._at) if pattern else None
            tail = self._text[max(self._at, len(self._text) - longest + 1) :] if longest else ""
            certain = len(self._text) - (0 if self.final else held_back(tail, markers))
            if found is not None and found.start() >= certain:
                found = None  # a longer marker may begin here or before
            end = certain if found is None else found.start()
            if left is not None and end - self._at > left:
                end, found = self._at + left, None
                taken = self._consume(end)
                take(taken if coded else self.codes.decode(taken))
                return TOO_LONG
            if end > self._at:
                left = None if left is None else left - (end - self._at)
                taken = self._consume(end)
                take(taken if coded else self.codes.decode(taken))
            if found is not None:
                return self._consume(found.end())
            if self.final:
                return None
            yield

    def peek(self) -> Generator[None, None, str]:
        """Return the next letter without reading it; nothing at the end."""
        while self._at == len(self._text):
            if self.final:
                return ""
            yield
        return self._text[self._at]

    def skip(self, letters: str, take: Take | None = None) -> Generator[None, None, str]:
        """Read all of these letters that come next, and return the one after them."""
        while (letter := (yield from self.peek())) and letter in letters:
            end = self._at
            while end < len(self._text) and self._text[end] in letters:
                end += 1
            skipped = self._consume(end)
            if take is not None:
                take(skipped)
        return letter

    def one(self, take: Take | None = None) -> str:
        """Read the letter that ``peek`` returned."""
        letter = self.codes.decode(self._consume(self._at + 1))
        if take is not None:
            take(letter)
        return letter

    def scan(self, letters: re.Pattern[str], take: Take) -> Generator[None, None, str]:
        """Give the text before the next letter of a class to ``take``; return that letter."""
        while (yield from self.peek()):
            found = letters.search(self._text, self._at)
            end = len(self._text) if found is None else found.start()
            if end > self._at:
                take(self.codes.decode(self._consume(end)))
            if found is not None:
                return found[0]
        return ""


Reading = Generator[None, None, None]


class Machine:
    """A reader with its source: give it text as it comes, then say that no more will."""

    def __init__(self, codes: MarkerCodes, read: Callable[[Source], Reading]) -> None:
        self.source = Source(codes)
        self._reading = read(self.source)
        self._over = False

    def feed(self, text: str) -> None:
        """Read more text."""
        self.source.add(text)
        self._go_on()

    def finish(self) -> None:
        """Read the rest."""
        self.source.final = True
        self._go_on()

    def _go_on(self) -> None:
        if not self._over:
            try:
                next(self._reading)
            except StopIteration:
                self._over = True
