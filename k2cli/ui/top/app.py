"""The live view on a terminal, by textual. The only module that imports it.

textual owns the terminal: the alternate screen, keys and sizes. What is shown is drawn by
``screen`` in lines of text, in the colours of the terminal, and scrolled here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from k2cli.ui.top.look import Look, without_style
from k2cli.ui.top.screen import Screen, screen_of
from k2cli.ui.top.state import TopState

if TYPE_CHECKING:
    from k2cli.client.status_watch import Observation

_TICK_SECONDS = 1.0
_SIZE_VARIABLES = ("COLUMNS", "LINES")


class Watch(Protocol):
    """A source of observations; ``client.StatusWatch`` is one."""

    interval_seconds: float

    def start(self, notify: Callable[[Observation], None]) -> None:
        """Begin; call ``notify`` from any thread."""
        ...

    def stop(self) -> None:
        """End."""
        ...


def run_top(watch: Watch, place: str) -> int:
    """Show the view until the user leaves it; return 0, or 128 and the signal that ended it.

    Args:
        watch: the observations.
        place: the server or run that is watched, in words.

    Raises:
        Exception: a bug in k2, after the terminal is restored.
    """
    for variable in _SIZE_VARIABLES:
        # With them the size of the terminal, and its changes, would be ignored.
        os.environ.pop(variable, None)
    app = TopApp(watch, place, Look(unicode=_terminal_has_unicode()))
    app.run(mouse=False)
    if app.bug is not None:
        raise app.bug
    return app.ended_by


def _terminal_has_unicode() -> bool:
    """Return True if the stream to which textual writes is encoded in a UTF."""
    stream = sys.__stderr__
    encoding = (stream.encoding if stream is not None else None) or "ascii"
    return encoding.lower().replace("-", "").startswith("utf")


class Observed(Message):
    """An observation for the event loop of the app."""

    def __init__(self, observation: Observation) -> None:
        super().__init__()
        self.observation = observation


class TopView(Widget):
    """The whole screen."""

    DEFAULT_CSS = """
    TopView { width: 100%; height: 100%; background: ansi_default; color: ansi_default; }
    """

    def __init__(self, state: TopState, look: Look, *, styled: bool) -> None:
        super().__init__()
        self.state = state
        self._look = look
        self._styled = styled
        self._screen = Screen([], 0, 1)
        self._offset = 0

    def redraw(self) -> None:
        """Draw the state as it is now."""
        width, height = self.size
        now = time.monotonic()
        before = self._screen.lines
        self._screen = screen_of(self.state, now, width, height, self._offset, self._look)
        self._offset = self._screen.offset
        lines = self._screen.lines
        if len(lines) != len(before):
            self.refresh()
            return
        # Over a slow connection every line counts.
        for y, (new, old) in enumerate(zip(lines, before, strict=True)):
            if new != old:
                self.refresh(Region(0, y, width, 1))

    def scroll_lines(self, lines: int) -> None:
        """Scroll down by a number of lines, or up by a negative one."""
        self._offset = max(0, self._offset + lines)
        self.redraw()

    @property
    def page(self) -> int:
        """The number of lines that are scrolled together."""
        return self._screen.page

    @property
    def plain(self) -> list[str]:
        """The lines as text."""
        return [line.plain for line in self._screen.lines]

    def on_resize(self) -> None:
        """Draw for the new size."""
        self.redraw()
        self.refresh()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the height of the terminal."""
        return container.height

    def render_line(self, y: int) -> Strip:
        """Return one line for textual."""
        lines = self._screen.lines
        width = self.size.width
        if y >= len(lines):
            return Strip.blank(width)
        # rich leaves out the style of a whole text that has no others.
        line = Text().append_text(lines[y]) if self._styled else without_style(lines[y])
        strip = Strip(line.render(self.app.console))
        return strip.adjust_cell_length(width).simplify()


class TopApp(App[None]):
    """The application.

    Attributes:
        bug: an error of k2 itself that ended it.
        ended_by: 0, or 128 and the number of a signal.
    """

    CSS = "Screen { background: ansi_default; color: ansi_default; overflow: hidden; }"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = [  # noqa: RUF012 - as textual declares it
        Binding("q,Q,ctrl+c,ctrl+q", "leave", priority=True),
        Binding("ctrl+z", "suspend_process", priority=True),
        Binding("up,k", "scroll(-1)"),
        Binding("down,j", "scroll(1)"),
        Binding("pageup,b", "scroll_page(-1)"),
        Binding("pagedown,space", "scroll_page(1)"),
        Binding("home,g", "scroll(-100000)"),
        Binding("end,G", "scroll(100000)"),
    ]

    def __init__(self, watch: Watch, place: str, look: Look) -> None:
        # textual takes the variable out of the environment, even if it is empty.
        styled = not os.environ.get("NO_COLOR")
        super().__init__(ansi_color=True)
        self.bug: Exception | None = None
        self.ended_by = 0
        self._watch = watch
        state = TopState(place, watch.interval_seconds, time.monotonic())
        self.view = TopView(state, look, styled=styled)

    def compose(self) -> ComposeResult:
        """Yield the only widget."""
        yield self.view

    def on_mount(self) -> None:
        """Begin to watch, and end on signals with the terminal restored."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        self.set_interval(_TICK_SECONDS, self._tick)
        self._watch.start(self._notify)

    def on_unmount(self) -> None:
        """End watching."""
        self._watch.stop()

    def _notify(self, observation: Observation) -> None:
        """Pass on an observation; called from the thread that watches."""
        if self.is_running:
            self.post_message(Observed(observation))

    def on_observed(self, message: Observed) -> None:
        """Show an observation."""
        observation = message.observation
        if observation.bug is not None:
            self._end_with(observation.bug)
            return
        try:
            self.view.state.observe(observation)
            self.view.redraw()
        except Exception as error:  # textual would print a traceback
            self._end_with(error)

    def _end_with(self, bug: Exception) -> None:
        self.bug = bug
        self.exit()

    def _tick(self) -> None:
        """Count on the seconds of silence: nothing comes that could do it."""
        if self.view.state.silent_seconds(time.monotonic()) is not None:
            self.view.redraw()

    def _on_signal(self, number: signal.Signals) -> None:
        self.ended_by = 128 + number
        self.exit()

    def action_leave(self) -> None:
        """Leave the view."""
        self.exit()

    def action_scroll(self, lines: int) -> None:
        """Scroll by lines."""
        self.view.scroll_lines(lines)

    def action_scroll_page(self, pages: int) -> None:
        """Scroll by what the screen holds."""
        self.view.scroll_lines(pages * self.view.page)
