"""A picture of a terminal's screen, for documents."""

from __future__ import annotations

import io
import re
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

_COLOURS = {"default": None, "brown": "yellow", "brightblack": "bright_black"}
"""Names of the emulator that rich does not have."""


def svg_of_screen(screen: Any, title: str) -> str:
    """Return the SVG of a screen of ``pyte``, without the empty lines at its end."""
    columns = screen.columns
    console = Console(record=True, width=columns, file=io.StringIO(), color_system="256")
    rows = [screen.buffer[y] for y in range(screen.lines)]
    while rows and not "".join(rows[-1][x].data for x in range(columns)).strip():
        rows.pop()
    for row in rows:
        line = Text()
        for style, cells in groupby((row[x] for x in range(columns)), _style):
            line.append("".join(cell.data for cell in cells), Style(**style))
        line.rstrip()
        console.print(line, no_wrap=True, soft_wrap=True)
    svg = console.export_svg(title=title, unique_id=title.replace(" ", "-"))
    # Fonts are those of the reader's machine: nothing is loaded from elsewhere.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def _style(cell: Any) -> dict[str, Any]:
    return {
        "color": _COLOURS.get(cell.fg, cell.fg),
        "bold": cell.bold,
        "italic": cell.italics,
        "underline": cell.underscore,
        "reverse": cell.reverse,
    }
