"""``k2 top`` on a pseudo-terminal, beside a server whose statuses a test chooses."""

from __future__ import annotations

import json
import re
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.commands.test_target import live_record, save
from tests.server.commands import run_k2
from tests.support.terminal import Terminal
from tests.ui.top.statuses import members, rank, request

HOSTILE = "kimi\x1b]0;owned\x07\x1b[2J\x1b[31m\u202e\nk2"


class StatusServer:
    """A server of one status. ``status_code`` is that of its answers."""

    def __init__(self) -> None:
        self.document: Any = members()
        self.status_code = 200
        self.keys: list[str | None] = []
        self.methods: set[str] = set()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.open()
        self.url = f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Listen, always at the same port."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.keys.append(self.headers["Authorization"])
                served.methods.add(f"{self.command} {self.path}")
                body = json.dumps(served.document).encode()
                self.send_response(served.status_code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_DELETE = do_PUT = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def server() -> Iterator[StatusServer]:
    served = StatusServer()
    yield served
    served.close()


@contextmanager
def top(server: StatusServer, *arguments: str, columns: int = 80, **environment: str) -> Any:
    with Terminal("top", "--url", server.url, "--interval", "0.5", *arguments, columns=columns,
                  **environment) as terminal:  # fmt: skip
        yield terminal


def screen(terminal: Terminal) -> list[str]:
    return [line.rstrip() for line in terminal.screen.display]


def without_history(terminal: Terminal) -> list[str]:
    return [line for line in screen(terminal) if " max " not in line]


def shows(terminal: Terminal, text: str) -> None:
    terminal.wait(lambda: text in "\n".join(screen(terminal)), f"{text!r} is not shown")


@pytest.mark.parametrize(("key", "status"), [("q", 0), ("\x03", 0), (signal.SIGTERM, 143)])
def test_it_leaves_the_terminal_as_it_was(server: StatusServer, key: Any, status: int) -> None:
    with top(server, PYTHONIOENCODING="ascii") as terminal:
        before = termios.tcgetattr(terminal._main)
        shows(terminal, "3 requests")
        assert termios.tcgetattr(terminal._main) != before
        if isinstance(key, str):
            terminal.type(key)
        else:
            terminal.process.send_signal(key)
        assert terminal.close() == status
        assert termios.tcgetattr(terminal._main) == before
        for mode in ("1049", "2004", "1004"):  # the alternate screen, pasting, focus
            assert terminal.raw.rfind(f"?{mode}l") > terminal.raw.rfind(f"?{mode}h") > 0
        assert terminal.raw.rfind("?25h") > terminal.raw.rfind("?25l") > 0
        assert "?1000h" not in terminal.raw  # the mouse, with which text is selected
        assert terminal.raw.isascii()
        assert "#####" in terminal.raw
        assert "Traceback" not in terminal.raw
    assert server.methods == {"GET /v1/status"}


def test_resizes_and_no_color(server: StatusServer) -> None:
    with top(server, NO_COLOR="1") as terminal:
        shows(terminal, "1:01:40  messages\n\nq leave")  # the end: all of the screen is drawn
        eighty = without_history(terminal)
        terminal.resize(40, 12)
        shows(terminal, "↓")
        assert screen(terminal)[0] == "kimi-k2  ready  up 2 h 03 min  1 restart"
        terminal.resize(200, 30)
        shows(terminal, "PROCESS")
        terminal.resize(80)
        terminal.wait(lambda: without_history(terminal) == eighty, "the first screen is not back")
        terminal.type("q")
        assert terminal.close() == 0
        styles = set(re.findall(r"\x1b\[([0-9;]*)m", terminal.raw))
        assert styles <= {"", "0", "39", "49", "39;49"}


def test_foreign_names_control_nothing(server: StatusServer) -> None:
    server.document = members(
        model={"name": HOSTILE},
        ranks=[rank(0, 400.0, node=HOSTILE, gpu=HOSTILE, phase=HOSTILE)],
        requests={"decode": 1, "listed": [request(HOSTILE, key=HOSTILE, id=HOSTILE)]},
        link={"transport": HOSTILE, "reason": HOSTILE, "interfaces": [HOSTILE]},
        state=HOSTILE, cause=HOSTILE, run_id=HOSTILE,
    )  # fmt: skip
    with top(server, columns=200) as terminal:
        shows(terminal, "1 request")
        assert screen(terminal)[0].startswith("kimi k2")
        terminal.type("q")
        assert terminal.close() == 0
        for harmful in ("\x1b]0;", "\x1b[2J", "\x1b[31m\u202e", "\u202e", "owned"):
            assert harmful not in terminal.raw


def test_a_run_that_goes_away_and_comes_back(server: StatusServer) -> None:
    with top(server) as terminal:
        shows(terminal, "2 h 03 min")
        server.close()
        shows(terminal, "no answer for")
        shows(terminal, "nothing answers at http://127.0.0.1")
        shows(terminal, "118 completed")  # the last that is known
        server.document = members(run_id="kimi-k2-3c4d", attempt=1)
        server.open()
        shows(terminal, "kimi-k2-3c4d")
        terminal.wait(lambda: "no answer" not in "".join(screen(terminal)), "it still waits")
        server.status_code, server.document = 401, {"error": {"message": "no such key"}}
        shows(terminal, "no such key")
        server.status_code, server.document = 200, {"model": "none of k2"}
        shows(terminal, "does not answer with the status")
        terminal.type("q")
        assert terminal.close() == 0


def test_a_run_on_this_machine_is_found_with_its_key(server: StatusServer) -> None:
    run = live_record()
    save(run, "")
    with Terminal("top", "toy", "--interval", "0.5", K2_API_KEY="another") as terminal:
        shows(terminal, "run toy-1a2b is ready; it is shown once it is ready")
        save(run, server.url)
        shows(terminal, "3 requests")
        assert set(server.keys) == {"Bearer s3cret"}
        save(replace(run, state="failed", cause="rank 1 was killed"), server.url)
        server.close()
        shows(terminal, "run toy-1a2b failed: rank 1 was killed")
        server.open()
        again = replace(run, run_id="toy-3c4d", created=run.created + 1)
        server.document = members(run_id=again.run_id)
        save(again, server.url)
        shows(terminal, "toy-3c4d")
        terminal.type("q")
        assert terminal.close() == 0
        assert "s3cret" not in terminal.raw


def test_what_it_refuses(server: StatusServer, tmp_path: Path) -> None:
    done = run_k2("top", "--url", server.url)
    assert done.returncode == 2
    assert "k2 top needs a terminal" in done.stderr
    assert "hint: k2 ps --json" in done.stderr
    assert done.stdout == ""
    for arguments, environment, status, message, hint in (
        ((), {"TERM": "dumb"}, 2, "TERM='dumb'", "hint: k2 ps"),
        (("--interval", "nan"), {}, 2, "'nan'", "k2 top --interval 2"),
        (("--url", "http://127.0.0.1:9"), {}, 5, "nothing answers", "hint: k2 ps"),
    ):
        with top(server, *arguments, columns=200, **environment) as terminal:
            assert terminal.close() == status, terminal.text
            assert message in terminal.text
            assert hint in terminal.text
            assert "\x1b[?1049h" not in terminal.raw
    server.status_code = 404
    with top(server, columns=200) as terminal:
        assert terminal.close() == 1
        assert "it is no server of k2 launch" in terminal.text
    server.status_code, server.document = 403, {"error": {"message": "not this key"}}
    with top(server, columns=200) as terminal:
        assert terminal.close() == 4
        assert "not this key" in terminal.text


def test_without_textual_the_command_that_installs_it_is_shown(
    server: StatusServer, tmp_path: Path
) -> None:
    (tmp_path / "textual.py").write_text("raise ModuleNotFoundError('gone', name='textual')")
    with top(server, columns=200, PYTHONPATH=str(tmp_path)) as terminal:
        assert terminal.close() == 1
        assert "k2 top needs the package textual" in terminal.text
        command = f"{sys.executable} -m pip install 'textual>="
        assert command in terminal.text.replace("\n", "")
