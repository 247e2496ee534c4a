"""Bytes of other programs and machines: every decoder ends them with an error of its own kind.

No internal error (exit status 70) may come of JSON that is nested too deeply, of bytes that are no
UTF-8, of numbers that are too large, or of values of another type.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from k2cli.client.client import ApiClient, GenerationOptions, ModelInfo
from k2cli.doctor.recording import replay
from k2cli.doctor.redaction import Redactor
from k2cli.errors import K2Error
from k2cli.files import decode_json
from k2cli.guard.oom_evidence import find_in_jetsam_report
from k2cli.guard.supervisor_pipe import SupervisorPipe
from k2cli.launch.guard_commands import GuardCommand
from k2cli.protocol import LivenessMessage, RunReady
from k2cli.protocol.wire import Channel, ConnectionLost
from k2cli.protocol.wire_streams import AsyncChannel
from k2cli.server.errors import without_folders
from k2cli.supervisor.processes import Processes

PACKAGE = Path(__file__).resolve().parents[2] / "k2cli"
RECORDINGS = Path(__file__).resolve().parents[1] / "doctor" / "data"
DEEP = "[" * 200_000
HOSTILE_JSON = [
    DEEP, '{"a":' * 200_000, "[]", "7", "null", '""', '"\\ud800"', "1e999", "9" * 5000, "NaN",
    "{}", '[{}, 7, [], null]', '{"pid": "x"}', "",
]  # fmt: skip
HOSTILE_FRAMES = [
    b"\xff",
    b"\xa1\xff",
    b"\x91" * 200_000,
    b"\xc1",
    b"",
    b"\x81\xa4type\xc0",
    b"\x82\xa4type\xa7LogLine\xa4node\xa1\xff",
]


@pytest.mark.parametrize("text", HOSTILE_JSON)
@pytest.mark.parametrize(
    "probe", ["k2", "ip", "system_profiler", "hostname", "meminfo", "sysctl", "vm_stat", "pmset",
              "ifconfig", "networksetup", "ibv_devices", "nvidia-smi", "date", "cgroup"]
)  # fmt: skip
def test_a_recording_of_any_form_is_replayed_or_refused(
    tmp_path: Path, probe: str, text: str
) -> None:
    folder = tmp_path / "recording"
    shutil.copytree(RECORDINGS / "healthy-pair", folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for node in manifest["nodes"]:
        (folder / "odd.txt").write_text(text)
        node["probes"][probe] = {"file": "odd.txt", "status": 0}
    path.write_text(json.dumps(manifest))
    replay(folder)
    assert isinstance(Redactor().probe(probe, text), str)


@pytest.mark.parametrize("file", ["a\0b", "../manifest.json", "/etc/passwd", "x" * 5000, ""])
def test_a_recording_names_no_file_of_others(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "recording"
    shutil.copytree(RECORDINGS / "healthy-pair", folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["nodes"][0]["probes"]["hostname"] = {"file": file, "status": 0}
    path.write_text(json.dumps(manifest))
    with pytest.raises(K2Error):
        replay(folder)


@pytest.mark.parametrize("text", HOSTILE_JSON)
def test_a_report_of_the_kernel_of_any_form_is_no_evidence(text: str) -> None:
    assert find_in_jetsam_report(f"{{}}\n{text}", 7) is None
    page = '{"memoryStatus": {"pageSize": 1e308}, "processes": [{"pid": 7, "reason": "x",'
    assert find_in_jetsam_report(f'{{}}\n{page} "rpages": 1e308}}]}}', 7) is None


@pytest.mark.parametrize("body", HOSTILE_FRAMES)
async def test_a_frame_of_any_form_ends_its_connection(body: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">I", len(body)) + body) if len(body) < 1000 else None
        channel: Channel[Any] = Channel(ours, LivenessMessage)
        channel._frames.add(struct.pack(">I", len(body)) + body)
        with pytest.raises(ConnectionLost, match="protocol"):
            channel.receive(1.0)
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack(">I", len(body)) + body)
    stream: AsyncChannel[Any] = AsyncChannel(reader, None, LivenessMessage)  # type: ignore[arg-type]
    with pytest.raises(ConnectionLost, match="protocol"):
        await stream.receive()


@pytest.mark.parametrize("line", [DEEP.encode(), b"\xff", b'{"type": "\xff"}', b"a" * 2**21])
async def test_a_line_of_the_supervisor_of_any_form_ends_the_conversation(line: bytes) -> None:
    reader = asyncio.StreamReader(limit=2**20)
    reader.feed_data(line + b"\n")
    reader.feed_eof()
    pipe = SupervisorPipe(reader, None)  # type: ignore[arg-type]
    with pytest.raises(ConnectionLost, match="broke the protocol"):
        async for _ in pipe.messages():
            pass


class Log:
    """The part of a journal that receives lines."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def log_line(self, command: GuardCommand, line: bytes) -> None:
        self.lines.append(line)


async def test_lines_that_are_no_events_do_not_hide_the_next_event() -> None:
    """A shell's start-up file on a node may print anything before the guard does."""
    event, log, events = RunReady("http://127.0.0.1:1"), Log(), []
    processes = Processes(log, events.append, lambda: None, lambda work: None)  # type: ignore[arg-type]
    reader = asyncio.StreamReader(limit=2**20)
    for line in (b"welcome", DEEP.encode(), b'"\xff"', b"a" * 2**21, msgspec.json.encode(event)):
        reader.feed_data(line + b"\n")
    reader.feed_eof()
    await processes._read_events(None, reader)  # type: ignore[arg-type]
    assert events == [event]
    assert len(log.lines) == 4


ANSWERS = [text.encode() for text in HOSTILE_JSON] + [
    b'{"data": 7}', b'{"data": [7, {"id": {}}]}', b'{"choices": 7}', b'{"choices": [7]}',
    b'{"choices": [{"delta": 7, "finish_reason": {}}], "usage": 7}', b'{"error": {"message": 7}}',
    b'{"choices": [{"text": 7, "finish_reason": "stop"}], "usage": {"timings": 7}}',
    b'{"k2": {"completion_tokens": 1e308}, "choices": [{"text": "a"}]}', b"\xff", b'{"tokens": 7}',
    b'{"tokens": [1, "x"]}', b'{"k2": {"completion_tokens": 99999999999}}',
]  # fmt: skip


@pytest.mark.parametrize("body", ANSWERS)
@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_of_any_form_is_understood_or_refused(body: bytes, status: int) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        stream = b"data: " + body + b"\n\ndata: [DONE]\n\n"
        return httpx2.Response(status, content=stream if b"stream" in request.content else body)

    client = ApiClient("http://127.0.0.1:1")
    client._http = httpx2.Client(transport=httpx2.MockTransport(answer))
    model = ModelInfo("toy", is_k2=True)
    for ask in (
        client.models,
        lambda: client.pick_model("toy"),
        lambda: client.tokenize("a"),
        lambda: list(client.chat(model, [], GenerationOptions())),
        lambda: client.complete(model, [1], 4),
    ):
        with contextlib.suppress(K2Error):
            ask()


def test_an_answer_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2cli.client.client._MAX_ANSWER_BYTES", 10_000)
    monkeypatch.setattr("k2cli.client.answers._MAX_LINE_BYTES", 10_000)

    def endless() -> Any:
        while True:
            yield b"a" * 1000

    client = ApiClient("http://127.0.0.1:1")
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=endless()))
    client._http = httpx2.Client(transport=transport)
    with pytest.raises(K2Error, match="more than 10000 bytes"):
        client.models()
    with pytest.raises(K2Error, match="more than 10000 bytes"):
        list(client.chat(ModelInfo("toy"), [], GenerationOptions()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /home/jo/k2/config.json: no", "cannot read config.json: no"),
        ("'/Users/Jo Doe/My Models/a.json' is cut short", "'a.json' is cut short"),
        ("~/models/a.json; /srv/b/c.json", "a.json; c.json"),
        ("see http://a.example/b/c and 1/2 of it and/or", None),
    ],
)
def test_clients_see_no_folders(text: str, shown: str | None) -> None:
    assert without_folders(text) == (shown or text)


# --- the rule -----------------------------------------------------------------------------------

# Calls that wait for a FIFO, read without end, or raise more than one kind of error, and the only
# files that may have them, each for the reason given.
PLAIN_CALLS = {
    "load": {"json", "tomllib"},
    "loads": {"json", "tomllib"},
    "open": {"os", "gzip"},
    "decode": {"msgspec.json", "msgspec.msgpack", "decoder", "_decoder", "self._decoder", "_news"},
    "Decoder": {"msgspec.json", "msgspec.msgpack"},
}
MODES = ("r", "rb", "w", "wb", "a", "ab")
ALLOWED = {
    "cli.py": "the null device",
    "files.py": "the functions that all others use",
    **dict.fromkeys(
        ["planning/hardware/chips.py", "planning/speed/constants.py", "models/catalog.py",
         "agent/self_report.py", "agent/own_wheel.py", "nodes/interpreter.py"],
        "files of this package",
    ),
    "sharding/architectures.py": "files of mlx-lm's package",
    "planning/hardware/machine.py": "files of the kernel in /sys",
    "agent/activity.py": "files of the kernel in /proc",
    "guard/oom_evidence.py": "files of the kernel in /proc and /dev/kmsg",
    "agent/freshness.py": "files of the kernel in /proc",
    "guard/work.py": "files of the kernel in /proc",
    "launch/mpi.py": "creation with O_EXCL",
    **dict.fromkeys(
        ["models/text/conversation_renderer.py", "server/dialects/answer_formats.py"],
        "a part of a bounded body, with json.loads' errors",
    ),
    "connect/config_file.py": "creation with O_EXCL",
    "connect/execute.py": "the terminal of this process",
    "connect/formats/jsonc.py": "one text or number of a bounded file, with json.loads' errors",
    "connect/formats/toml.py": "the text of a bounded file, with tomllib's errors",
    "chat/schema.py": "a bounded file and the text of an answer, with json.loads' errors",
    "server/structured/schema_values.py": "JSON that it has written itself",
    "server/page/files.py": "files of this package",
    **dict.fromkeys(
        ["server/dialects/anthropic_writer.py", "server/output/emitter.py",
         "server/output/json_calls.py", "server/output/parameter_types.py",
         "server/output/typed_calls.py"],
        "text of a bounded answer of the model, with json.loads' errors",
    ),
    "planning/hardware/cards.py": "a file of this package",
    "rank/kernels/cache.py": "folders of k2's own private cache, and files of the kernel in /proc",
    "rank/listen_address.py": "a library of MLX and the process's own memory",
    "agent/locks.py": "creation with O_EXCL, and /proc/locks",
    "agent/link.py": "writes into a new private folder",
    "models/safetensors_writer.py": "creation with O_EXCL",
    "models/sources/wheel.py": "a wheel whose digest is pinned, and its copy",
    **dict.fromkeys(
        ["models/files.py", "runs/hand_over.py"], "a folder, to hold its lock; no link is followed"
    ),
    "models/json_files.py": "read_regular and json.loads, with its errors, for configs",
    "models/safetensors_header.py": "a bounded header, with json.loads' errors",
    "models/sources/hub_headers.py": "bounded bytes, with json.loads' errors",
    "models/text/tokenizer_file.py": "what the tokenizers library has encoded",
    "server/reader_queues.py": "decode_with",
    "server/killable_reader.py": "decode_with",
    "protocol/wire.py": "decode_with",
    "protocol/wire_streams.py": "decode_with",
    "guard/supervisor_pipe.py": "decode_with",
    "supervisor/start.py": "decode_with",
    "supervisor/processes.py": "decode_with",
    "guard/reader_process.py": "frames of the guard, its parent",
    "chat/settings.py": "read_regular and tomllib.loads, with its errors",
}  # fmt: skip


def plain_calls(path: Path) -> list[str]:
    """Find the calls and decoders of a file that the table has to explain."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            if ast.unparse(node.value) in PLAIN_CALLS.get(node.attr, ()):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            modes = {each.value for each in node.args if isinstance(each, ast.Constant)}
            opens = name.endswith(".open") and modes & set(MODES)
            whole = name.endswith((".read_text", ".read_bytes")) and not node.args
            if name == "open" or opens or whole:
                found.append(name)
    return found


def test_foreign_bytes_are_read_by_the_functions_made_for_it() -> None:
    plain = {
        path.relative_to(PACKAGE).as_posix(): calls
        for path in sorted(PACKAGE.rglob("*.py"))
        if (calls := plain_calls(path))
    }
    unexplained = {name: calls for name, calls in plain.items() if name not in ALLOWED}
    assert unexplained == {}, "use read_regular, open_regular, decode_json or decode_with"
    assert set(ALLOWED) <= set(plain), "a reason is left that no call needs any more"


@pytest.mark.parametrize("text", [DEEP, "\ud800", "9" * 5000])
def test_one_kind_of_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        decode_json(text if text != "\ud800" else b'"\xff"', type=int)
    assert isinstance(caught.value, msgspec.DecodeError)
