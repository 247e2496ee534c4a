"""Hostile MCP servers: none of them can break the chat's side, and none is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from k2cli.tools import host as tool_host
from k2cli.tools.host import ToolHost
from k2cli.tools.messages import MOST_RESULT_BYTES, CallDone, Connected, Failed
from k2cli.tools.settings import ServerSettings

SERVER = Path(__file__).with_name("hostile_server.py")


@pytest.fixture
def host() -> Iterator[ToolHost]:
    host = ToolHost()
    yield host
    host.close()


def never() -> bool:
    return False


def server(how: str, seconds: float = 20.0) -> ServerSettings:
    return ServerSettings(how, sys.executable, (str(SERVER), how), timeout_seconds=seconds)


def call(host: ToolHost, how: str, seconds: float = 20.0) -> CallDone | Failed:
    return host.call((how, "go", "{}"), seconds, never)


def servers_left() -> list[int]:
    return [process.pid for process in psutil.process_iter() if _is_left(process)]


def _is_left(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
        alive = process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    return alive and (words[1:2] == [str(SERVER)] or words[-1:] == ["k2-test-stays"])


def test_calls_of_hostile_servers(host: ToolHost) -> None:
    bad = ["die", "huge", "endless-line", "malformed", "rubbish", "noise", "environment"]
    bad += ["escape", "no-message", "requests", "blocks"]
    connected = host.connect([*map(server, bad), server("hang", 0.5)], never)
    assert all(isinstance(each, Connected) for each in connected.values()), connected
    for how, reason in {
        "die": "it exited with 3: about to die",
        "endless-line": "it sent a message of more than",
        "no-message": "it sends lines that are no messages of MCP",
        "malformed": "it sent an answer that MCP does not allow",
        "requests": "it sends requests without reading the answers",
    }.items():
        failed = call(host, how)
        assert isinstance(failed, Failed)
        assert reason in failed.reason
    late = call(host, "hang", 0.5)
    assert isinstance(late, Failed)
    assert late.reason == "no answer within 0.5 s"
    again = call(host, "die")
    assert isinstance(again, Failed)
    assert "has ended" in again.reason
    huge = call(host, "huge")
    assert isinstance(huge, CallDone)
    assert huge.whole_bytes == 10**6
    assert huge.text.endswith("x\n[cut here: 65536 of 1000000 bytes]")
    assert len(huge.text) < MOST_RESULT_BYTES + 100
    blocks = call(host, "blocks")
    assert isinstance(blocks, CallDone)
    assert blocks.text.splitlines()[-1] == "[149000 more blocks, left out]"
    for how in ("rubbish", "noise"):
        assert isinstance(done := call(host, how), CallDone)
        assert done.text == "done"
    environment = call(host, "environment")
    assert isinstance(environment, CallDone)
    assert not {name for name in environment.text.split() if name.startswith(("K2_", "PYTHON"))}


def test_a_result_counts_though_it_was_read_after_the_limit(
    host: ToolHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat was stopped by Ctrl-Z, or got no processor, while the tool did its work."""
    host.connect([server("rubbish")], never)
    channel = host._channel
    assert channel is not None
    send = channel.send

    def send_and_wait(message: object) -> None:
        send(message)
        select.select([channel], [], [], 30)  # the result is there
        limit.has_passed = True

    limit = SimpleNamespace(has_passed=False)
    monkeypatch.setattr(tool_host, "Deadline", lambda seconds: limit)
    monkeypatch.setattr(channel, "send", send_and_wait)
    done = call(host, "rubbish")
    assert isinstance(done, CallDone)
    assert done.text == "done"


def test_what_servers_say_about_their_tools(host: ToolHost) -> None:
    wanted = [server("names"), server("many"), server("malformed-list")]
    connected = host.connect(wanted, never)
    names = connected["names"]
    assert isinstance(names, Connected)
    assert [tool.name for tool in names.tools] == [
        "go", "\x1b]0;owned\x07\x1b[2Jhidden\u202e\u200bend", "a b", "a.b", "nan",
    ]  # fmt: skip
    assert len(names.left_out) == 6
    assert all(text.isprintable() for text in names.left_out)
    many = connected["many"]
    assert isinstance(many, Connected)
    assert (len(many.tools), len(many.left_out)) == (128, 1)
    assert isinstance(connected["malformed-list"], Failed)


def test_ctrl_c_stops_a_call_and_a_start_and_no_process_is_left(host: ToolHost) -> None:
    host.connect([server("hang", 3600), server("escape"), server("stays")], never)
    assert len(servers_left()) == 4
    until = time.monotonic() + 0.5
    with pytest.raises(KeyboardInterrupt):
        host.call(("hang", "go", "{}"), 3600, lambda: time.monotonic() > until)
    assert isinstance(call(host, "escape"), CallDone)
    with pytest.raises(KeyboardInterrupt):
        host.connect([server("silent")], lambda: True)
    host.close()
    assert servers_left() == []


KILLED = """
import sys
from k2cli.tools.host import ToolHost
from k2cli.tools.settings import ServerSettings
host = ToolHost()
found = host.connect([ServerSettings("x", sys.executable, (sys.argv[1], "stays"))], lambda: False)
print(type(found["x"]).__name__, host._process.pid, flush=True)
sys.stdin.readline()
host.close()
"""


@pytest.mark.parametrize(
    ("killed", "number"),
    [("chat", signal.SIGKILL), ("host", signal.SIGKILL), ("host", signal.SIGTERM)],
)
def test_no_process_is_left_after_a_kill(killed: str, number: int) -> None:
    command = [sys.executable, "-c", KILLED, str(SERVER)]
    pipe = subprocess.PIPE
    chat = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert chat.stdin is not None
    assert chat.stdout is not None
    try:
        state, pid = chat.stdout.readline().split()
        assert state == "Connected"
        assert servers_left()
        os.kill(chat.pid if killed == "chat" else int(pid), number)
        if killed == "host":  # the chat kills the rest
            chat.stdin.close()
            assert chat.wait(30) == 0
            assert servers_left() == []
        until = time.monotonic() + 10
        while servers_left():
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        chat.kill()
        chat.wait()
        chat.stdin.close()
        chat.stdout.close()
        for left in servers_left():
            os.kill(left, signal.SIGKILL)


def test_a_server_at_a_url(host: ToolHost) -> None:
    command = [sys.executable, str(SERVER.with_name("web_server.py"))]
    web = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert web.stdout is not None
        url = f"http://127.0.0.1:{int(web.stdout.readline())}/mcp"
        wanted = [
            ServerSettings("web", url=url, headers={"X-Key": "s3cret"}),
            ServerSettings("stranger", url=url),
            ServerSettings("nobody", url="http://127.0.0.1:9/mcp"),
        ]
        found = host.connect(wanted, never)
        assert isinstance(found["web"], Connected), found
        for name in ("stranger", "nobody"):
            assert isinstance(found[name], Failed)
        done = host.call(("web", "double", '{"number": 21}'), 20, never)
        assert isinstance(done, CallDone)
        assert done.text == "42"
        flood = host.call(("web", "flood", "{}"), 20, never)
        assert isinstance(flood, Failed)
        again = host.call(("web", "double", '{"number": 1}'), 20, never)
        assert isinstance(again, CallDone), again
    finally:
        web.kill()
        web.wait()
        if web.stdout is not None:
            web.stdout.close()
