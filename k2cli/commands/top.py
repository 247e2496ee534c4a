"""Command ``k2 top``: watch a run live on the terminal."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.commands.target import ApiKeyOption, ModelArgument, UrlOption

if TYPE_CHECKING:
    from k2cli.client.client import ApiClient
    from k2cli.runs.record import RunRecord

LEAST_SECONDS, MOST_SECONDS = 0.5, 60.0
TEXTUAL = "textual>=8.2,<9"
"""Requirement of the extra ``top``, which an environment may be too old to know."""
_ENDINGS = {"stopped": "was stopped", "failed": "failed"}
_DUMB = ("", "dumb", "unknown")


def top(
    model: ModelArgument = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    interval: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=LEAST_SECONDS, max=MOST_SECONDS, help="Time between two looks."
        ),
    ] = 1.0,
) -> None:
    """Watch a run live: ranks with their memory, requests with their progress, tokens per second.

    The view follows the run over restarts, waits while nothing answers, and changes nothing. q or
    Ctrl-C leaves it. It needs a terminal, and the package textual (the extra top).

    Example: k2 top --interval 5

    Example: k2 top --url http://studio.local:8080
    """
    from k2cli.client.status_watch import StatusWatch
    from k2cli.errors import UsageError

    if math.isnan(interval):
        raise UsageError("--interval 'nan' is not a number", "k2 top --interval 2")
    _check_terminal()
    _check_textual()
    found = _Server(url, api_key) if url is not None else _LocalRun(model, api_key)
    found.check()

    from k2cli.ui.top.app import run_top

    status = run_top(StatusWatch(found.connect, interval), found.place)
    if status:
        raise typer.Exit(status)


def _check_terminal() -> None:
    """Refuse streams that are no terminal, and terminals without cursor movement.

    Raises:
        UsageError: with the command that prints the same once.
    """
    from k2cli.errors import UsageError

    # textual reads from stdin and writes to stderr.
    for name, stream in (("stdin", sys.stdin), ("stdout", sys.stdout), ("stderr", sys.stderr)):
        if not stream.isatty():
            raise UsageError(f"k2 top needs a terminal, and {name} is not one", "k2 ps --json")
    if (kind := os.environ.get("TERM", "")) in _DUMB:
        raise UsageError(f"k2 top cannot draw on a terminal with TERM='{kind}'", "k2 ps")


def _check_textual() -> None:
    from k2cli.errors import K2Error
    from k2cli.pip_command import pip_install

    try:
        import k2cli.ui.top.app  # noqa: F401
    except ImportError as error:
        if (error.name or "").split(".")[0] != "textual":
            raise
        raise K2Error(f"k2 top needs the package textual: {error}", pip_install(TEXTUAL)) from error


class _Server:
    """The server of ``--url``."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.place = url
        self._api_key = api_key

    def check(self) -> None:
        """Ask once.

        Raises:
            K2Error: if there is no answer, or none with a status.
        """
        with self.connect() as client:
            client.status()

    def connect(self) -> ApiClient:
        """Return a connection; nothing is sent yet.

        Raises:
            UsageError: if the URL is none.
        """
        from k2cli.client.client import ApiClient

        return ApiClient(self.place, self._api_key)


class _LocalRun:
    """The live run of this machine that serves a model, now and after it was launched again."""

    def __init__(self, model: str | None, api_key: str | None) -> None:
        self._model = model
        self._api_key = api_key
        self._last: RunRecord | None = None
        self.place = "the live run"

    def check(self) -> None:
        """Find a run, which may still be loading.

        Raises:
            K2Error: if there is none.
            NotAuthorisedError: if it does not accept the key.
        """
        from k2cli.errors import ClusterError

        self._last = self._find()
        self.place = f"run {self._last.run_id}"
        if self._last.url:
            try:
                with self.connect() as client:
                    client.status()
            except ClusterError:
                pass  # it is loading, or starting again: the view says so

    def connect(self) -> ApiClient:
        """Return a connection to the run as it is now.

        Raises:
            K2Error: if it is not live, or has no API yet.
        """
        from k2cli.client.client import ApiClient
        from k2cli.commands.target import key_of
        from k2cli.errors import ClusterError

        run = self._last = self._find()
        if not run.url:
            raise ClusterError(f"run {run.run_id} is {run.state}; it is shown once it is ready")
        # The run's own key may always see the status; a named one of K2_API_KEY need not.
        return ApiClient(run.url, key_of(run) or self._api_key, run.certificate_file)

    def _find(self) -> RunRecord:
        from k2cli.commands.target import run_serving
        from k2cli.errors import ClusterError, K2Error
        from k2cli.runs.record import find_run

        last = self._last and find_run(self._last.run_id)
        if last is not None and last.live:
            return last
        try:
            return run_serving(self._model)
        except K2Error:
            if last is None:
                raise
            ending = _ENDINGS.get(last.state, f"is {last.state}")
            cause = f": {last.cause}" if last.cause not in ("", last.state) else ""
            raise ClusterError(f"run {last.run_id} {ending}{cause}") from None
