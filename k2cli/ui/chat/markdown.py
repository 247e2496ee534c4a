"""Rendering of streamed Markdown: every character is written once and never redrawn.

Prose appears word by word, code line by line, and a table once it is complete. Redrawing an answer
at each token would take time quadratic in its length, and terminals repeat lines when the
cursor is moved back over wide characters or after a change of their size.

Line breaks stay where the model made them. ``finish`` gives what is still held back.
"""

from __future__ import annotations

from collections.abc import Callable

from k2cli.ui.chat.code import CodeStyler
from k2cli.ui.chat.inline import BOLD, Fragment, InlineStyler
from k2cli.ui.chat.line_start import Opening, opening
from k2cli.ui.chat.table import TableLines, cells, is_delimiter
from k2cli.ui.chat.wrap import Wrapper

DIM = "2"
_HEADINGS = (f"{BOLD};4", BOLD, f"{BOLD};3")
_LONGEST_ROW = 20_000
_MOST_BLANK_LINES = 2
_RULE_COLUMNS = 40
Prefix = tuple[Fragment, ...]


class MarkdownRenderer:
    """Filter from an answer to what a terminal shows.

    Args:
        columns: returns the current width of the terminal.
        styled: False for text without escape sequences, which keeps its markers.
    """

    def __init__(self, columns: Callable[[], int], *, styled: bool) -> None:
        self._columns = columns
        self._styled = styled
        self._wrapper = Wrapper(columns, styled=styled)
        # Exactly one of these takes the text of the current line:
        self._start: str | None = ""
        self._prose: InlineStyler | None = None
        self._line: list[str] = []
        self._prefix: Prefix = ()
        self._hang: Prefix = ()
        self._code: CodeStyler | None = None
        self._fence = ""
        self._quotes = 0
        self._row = ""
        self._row_prefixes: tuple[Prefix, Prefix] = ((), ())
        self._table: TableLines | None = None
        self._blank_lines = 0
        self._written = False

    @property
    def waiting_for(self) -> str:
        """Name the part of the answer that is held back until it is complete; "" if none is."""
        if self._table is not None:
            rows = self._table.rows
            return f"table, {rows} row" + ("" if rows == 1 else "s")
        return ""

    def push(self, text: str) -> str:
        """Add text; return what the terminal is to show now."""
        position = 0
        while position < len(text):
            end = text.find("\n", position)
            if end < 0:
                self._take(text[position:])
                break
            self._take(text[position:end])
            self._end_line()
            position = end + 1
        return self._wrapper.take()

    def finish(self) -> str:
        """Return everything that is held back, and end the last line."""
        if self._start or self._prefix or self._prose is not None or self._line:
            self._end_line()
        self._end_table()
        return self._wrapper.take()

    def _take(self, piece: str) -> None:
        """Add a piece of the current line."""
        if not piece:
            return
        if self._start is not None:
            self._start += piece
            self._decide(whole=False)
        elif self._prose is not None:
            self._feed(self._prose, piece)
        else:
            self._line.append(piece)

    def _end_line(self) -> None:
        if self._start is not None:
            self._decide(whole=True)
        elif self._prose is not None:
            self._end_prose()
        else:
            self._whole_line("".join(self._line))
        self._begin_line()

    def _begin_line(self) -> None:
        self._start, self._prose = "", None
        self._line.clear()
        self._prefix = self._hang = ()
        if self._code is not None and not self._quotes:
            self._start = None

    # --- the beginning of a line --------------------------------------------------------------

    def _decide(self, *, whole: bool) -> None:
        """Decide what kind of line begins, as soon as its first characters show it."""
        assert self._start is not None
        if self._code is not None:
            self._decide_quoted_code(whole=whole)
            return
        while True:
            found = opening(self._start, whole=whole)
            if found is None:
                return
            self._start = self._start[found.length :]
            if found.kind in ("quote", "item"):
                self._add_prefix(found)
                if not self._start and not whole:
                    return
                continue
            self._open(found, whole=whole)
            return

    def _add_prefix(self, found: Opening) -> None:
        indent = (" " * found.indent, "") if found.indent else None
        before = (indent,) if indent else ()
        if found.kind == "quote":
            bar = ("│ " if self._styled else "> ", DIM)
            self._prefix += (*before, bar)
            self._hang += (*before, bar)
        else:
            marker = "• " if self._styled and found.marker in "-*+" else f"{found.marker} "
            self._prefix += (*before, (marker, ""))
            self._hang += (*before, (" " * len(marker), ""))

    def _open(self, found: Opening, *, whole: bool) -> None:
        """Begin a line of a known kind; ``whole`` if it is complete."""
        text, self._start = self._start or "", None
        if found.kind == "blank":
            self._end_table()
            self._blank(text)
            return
        if found.indent:
            space = ((" " * found.indent, ""),)
            self._prefix, self._hang = self._prefix + space, self._hang + space
        if found.kind == "hold":
            self._line.append(text)
        else:
            self._end_table()
            self._open_prose(found, text)
        if whole:
            self._finish_opened()

    def _open_prose(self, found: Opening, text: str) -> None:
        base = ""
        if found.kind == "heading":
            level = len(found.marker)
            base = _HEADINGS[min(level, len(_HEADINGS)) - 1]
            if not self._styled:
                text = f"{found.marker} {text}"
        self._before_content()
        self._wrapper.begin(self._prefix, self._hang)
        self._prose = InlineStyler(base)
        self._feed(self._prose, text)

    def _finish_opened(self) -> None:
        if self._prose is not None:
            self._end_prose()
        else:
            self._whole_line("".join(self._line))

    def _feed(self, prose: InlineStyler, text: str, *, final: bool = False) -> None:
        text = text.replace("\t", " ")
        if not self._styled:
            self._wrapper.feed(text)
            return
        for fragment, style in prose.push(text, final=final):
            self._wrapper.feed(fragment, style)

    def _end_prose(self) -> None:
        assert self._prose is not None
        self._feed(self._prose, "", final=True)
        self._wrapper.end_line()
        self._prose = None

    def _blank(self, text: str) -> None:
        if self._prefix:
            self._before_content()
            self._wrapper.begin(self._prefix, self._hang)
            self._wrapper.end_line()
        elif self._written:
            self._blank_lines = min(self._blank_lines + 1, _MOST_BLANK_LINES)

    def _before_content(self) -> None:
        """Write the blank lines that came before; those at the end of an answer never appear."""
        for _ in range(self._blank_lines):
            self._wrapper.begin((), ())
            self._wrapper.write_line([])
        self._blank_lines = 0
        self._written = True

    # --- whole lines --------------------------------------------------------------------------

    def _whole_line(self, line: str) -> None:
        """Show a line that had to be complete: of code, of a table, a fence or a rule."""
        self._line.clear()
        if self._code is not None:
            self._code_line(line)
        elif line.startswith("|"):
            self._table_line(line)
        else:
            self._end_table()
            self._fence_or_rule(line)

    def _fence_or_rule(self, line: str) -> None:
        character = line[0]
        run = len(line) - len(line.lstrip(character))
        info = line[run:].strip()
        if character in "`~" and run >= 3 and not (character == "`" and "`" in info):
            self._open_fence(line[:run], info)
        elif character in "-*_" and not line.replace(" ", "").strip(character):
            self._before_content()
            columns = min(_RULE_COLUMNS, self._columns())
            self._wrapper.begin(self._prefix, self._hang)
            self._wrapper.write_line([("─" * columns if self._styled else line, DIM)])
        else:
            self._open_prose(Opening("prose"), line)
            self._end_prose()

    def _open_fence(self, fence: str, info: str) -> None:
        self._before_content()
        self._fence = fence
        self._quotes = sum(style == DIM for _, style in self._prefix)
        language = info.split()[0] if info.split() else ""
        self._code = CodeStyler(language if self._styled else "")
        self._code_prefix = tuple(part for part in self._prefix if part[1] == DIM)
        self._wrapper.begin(self._prefix, self._hang)
        self._wrapper.write_line([(f"{fence}{info}", DIM)])

    def _decide_quoted_code(self, *, whole: bool) -> None:
        """Take the markers of quotes off a line of code; a line without them ends the code."""
        assert self._start is not None
        rest, depth = self._start, 0
        while depth < self._quotes:
            stripped = rest.lstrip(" ")
            if not stripped and not whole:
                return
            if not stripped.startswith(">"):
                break
            if len(stripped) == 1 and not whole:
                return
            rest, depth = stripped[1:].removeprefix(" "), depth + 1
        if depth < self._quotes:
            self._code = None
            self._quotes = 0
            self._decide(whole=whole)
            return
        self._start = None
        self._line.append(rest)
        if whole:
            self._whole_line(rest)

    def _code_line(self, line: str) -> None:
        assert self._code is not None
        stripped = line.strip()
        closes = stripped.startswith(self._fence) and not stripped.strip(self._fence[0])
        self._wrapper.begin(self._code_prefix, self._code_prefix)
        if closes:
            self._wrapper.write_line([(line, DIM)])
            self._code = None
            self._quotes = 0
            return
        self._wrapper.write_line(self._code.line(line))

    # --- tables -------------------------------------------------------------------------------

    def _table_line(self, line: str) -> None:
        if self._table is not None:
            self._table.add(line)
            if self._table.is_full:
                self._show_table()
        elif self._row and is_delimiter(line) and len(cells(line)) == len(cells(self._row)):
            self._table = TableLines(self._row, line, styled=self._styled)
            self._row = ""
        else:
            self._end_table()
            if len(line) > _LONGEST_ROW:
                self._open_prose(Opening("prose"), line)
                self._end_prose()
                return
            self._row, self._row_prefixes = line, (self._prefix, self._hang)

    def _end_table(self) -> None:
        """Show a table that is complete, or a line that turned out to be none."""
        if self._row:
            row, self._row = self._row, ""
            own = self._prefix, self._hang
            self._prefix, self._hang = self._row_prefixes
            prose = self._prose
            self._open_prose(Opening("prose"), row)
            self._end_prose()
            self._prose = prose
            self._prefix, self._hang = own
        if self._table is not None:
            self._show_table()
            self._table = None

    def _show_table(self) -> None:
        assert self._table is not None
        self._before_content()
        prefix, hang = self._row_prefixes
        for number, parts in enumerate(self._table.take(self._room(hang))):
            self._wrapper.begin(hang if number else prefix, hang)
            self._wrapper.write_line(parts)

    def _room(self, prefix: Prefix) -> int:
        self._wrapper.begin(prefix, prefix)
        return self._wrapper.room()
