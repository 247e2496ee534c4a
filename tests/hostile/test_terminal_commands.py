"""Every command that prints, with hostile text in everything that it shows.

That is names of folders, values of configs, records, logs, clusters, plans, recordings, and the
answers and errors of a server.

All commands run in two processes: one writes to pipes, the other to a terminal.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from k2cli.cluster.description import Cluster, ClusterNode, Link, save_cluster
from k2cli.runs.record import FailureRecord, RankRecord, RunRecord, save_record
from k2cli.settings import runs_directory

FALSE = "error: all is lost"
PARTS = [
    "\x1b]52;c;cm0gLXJmIC8=\x07",  # to the clipboard
    "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",  # a link
    "\x1b[201~rm -rf /\n",  # the end of a paste
    "\x1b[2J\x1b[H",
    "\x9b31m\x9d0;title\x9c",  # the same with C1 controls
    "\u202egpj.exe\u2066",
    "zero\u200bwidth",
    f"\r\n{FALSE}\n",
    f"\u2028{FALSE}",
    "\x00\x07\x08\x0c\x7f",
    "größe 中文",
]
HOSTILE = "x".join(PARTS)
ONE_LINE = HOSTILE.replace("\n", " ").replace("\r", " ")
NAME = "x".join(part.replace("/", "").replace("\x00", "") for part in PARTS)[:120]

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What k2 itself writes to a terminal: colours, and the line that it draws anew.
STYLE = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[hl]|\x1b\[[12]?[KA]|\r")
MARK = "=== k2 test ==="

CHILD = f"""
import json, sys
from k2cli.cli import main
for words in json.load(open(sys.argv[1])):
    sys.argv = ["k2", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"\\n{MARK}{{code}}\\n")
        stream.flush()
"""


class Server(BaseHTTPRequestHandler):
    """A server whose every word is hostile; below ``/bad`` it refuses, below ``/odd`` it errs."""

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path.startswith("/bad"):
            self._answer(400, json.dumps({"error": {"message": HOSTILE}}).encode())
        elif self.path.startswith("/odd"):
            self._answer(200, json.dumps({"data": [{"id": HOSTILE}]}).encode() + b"\x1b\x9b")
        else:
            self._answer(200, json.dumps({"data": [{"id": HOSTILE}, 5]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/torn"):
            events: list[Any] = [{"choices": [{"text": HOSTILE}]}, {"error": {"message": HOSTILE}}]
        elif self.path.startswith("/shape"):
            events = [{"choices": [HOSTILE]}, {"k2": HOSTILE}]
        else:
            delta = {"choices": [{"delta": {"content": HOSTILE}}]}
            events = [delta, {"choices": [{"finish_reason": HOSTILE}], "usage": {HOSTILE: 1}}]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._answer(200, body.encode(), "text/event-stream")


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def plant_runs() -> None:
    record = RunRecord(
        "demo-1", HOSTILE, HOSTILE, "failed", "local", "single", 8,
        (RankRecord(0, "localhost"),), 1e9,
        cause=HOSTILE, failure=FailureRecord(HOSTILE, 0, "localhost", 1, (HOSTILE,)),
        settings={HOSTILE: HOSTILE}, left={HOSTILE: HOSTILE}, ended=1e9, url=HOSTILE,
    )  # fmt: skip
    record.folder.mkdir(parents=True)
    save_record(record)
    record.log_file.write_text(f"2026-01-31T12:00:00.123+01:00 node 0 | {ONE_LINE}")
    for number, state in enumerate(("orphaned", "lost")):
        other = replace(record, run_id=f"demo-{number + 2}", state=state)
        other.folder.mkdir()
        save_record(other)
    for name in (NAME, "\udcff\udc9b"):
        (runs_directory() / name).mkdir()
        (runs_directory() / name / "run.json").write_text(HOSTILE)


def plant_clusters() -> None:
    known = ClusterNode(
        "localhost", HOSTILE, HOSTILE, HOSTILE, 2**30, 2**30, interfaces={HOSTILE: (HOSTILE,)},
        limit_source=HOSTILE, python=HOSTILE,
    )  # fmt: skip
    other = ClusterNode(HOSTILE, HOSTILE)
    link = Link("localhost", HOSTILE, "ethernet", HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    save_cluster(Cluster("hostile", (known, other), (link,)))


def plant_models(base: Path, toy: Path) -> dict[str, str]:
    """Make models with hostile names and values, and return them by what is odd."""
    named = base / NAME
    shutil.copytree(toy, named)
    undecodable = base / "model\udcff\udc9b"
    shutil.copytree(toy, undecodable)
    config = json.loads((toy / "config.json").read_text())
    changed: dict[str, dict[str, Any]] = {
        "type": {"model_type": HOSTILE},
        "dtype": {"torch_dtype": HOSTILE},
        "quantization": {"quantization": {"bits": HOSTILE, "group_size": HOSTILE}},
        "layers": {"num_hidden_layers": HOSTILE},
        "scaling": {"rope_scaling": {HOSTILE: HOSTILE, "type": HOSTILE}},
    }
    models = {"name": str(named), "undecodable": str(undecodable)}
    for name, change in changed.items():
        folder = base / f"config-{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | change))
        models[name] = str(folder)
    headers = base / "headers"
    shutil.copytree(toy, headers)
    data = json.dumps({HOSTILE: {"dtype": HOSTILE, "shape": [1], "data_offsets": [0, 4]}}).encode()
    for path in headers.glob("*.safetensors*"):
        path.unlink()
    (headers / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + b"0000")
    return models | {"headers": str(headers), "gguf": str(plant_gguf(base))}


def plant_gguf(base: Path) -> Path:
    def text(value: str) -> bytes:
        data = value.encode()
        return len(data).to_bytes(8, "little") + data

    path = base / f"{NAME}.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little")
    field = text("general.architecture") + (8).to_bytes(4, "little") + text(HOSTILE)
    path.write_bytes(head + (1).to_bytes(8, "little") + field)
    return path


def hostile_plan(base: Path, toy: Path) -> str:
    """Let k2 make a plan, and put hostile text in place of its texts."""
    path = base / "plan.json"
    command = [sys.executable, "-m", "k2cli", "plan-memory", str(toy), "--json"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    plan = msgspec.json.decode(done.stdout)
    plan["model"] |= {"reference": HOSTILE, "quantization": HOSTILE, "architecture": HOSTILE}
    plan["reason"] = HOSTILE
    for node in plan["nodes"]:
        node |= {"name": HOSTILE, "limit_source": HOSTILE}
    for part in plan["placement"]["ranks"]:
        part["node"] = HOSTILE
    path.write_bytes(msgspec.json.encode(plan))
    return str(path)


@pytest.fixture
def commands(tmp_path: Path, toy_k2: Path, url: str) -> list[list[str]]:
    plant_runs()
    plant_clusters()
    models = plant_models(tmp_path, toy_k2)
    plan = hostile_plan(tmp_path, toy_k2)
    record = tmp_path / "recording"
    manifest = {
        "nodes": [{"name": HOSTILE, "system": None, "failure": HOSTILE, "hint": HOSTILE}],
        "schema_version": 1, "live_runs": [HOSTILE],
    }  # fmt: skip
    record.mkdir()
    (record / "manifest.json").write_text(json.dumps(manifest))
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([{"ssh": HOSTILE, "ips": [HOSTILE]}]))
    found = [["plan-memory", model] for model in models.values()]
    for model in (models["name"], models["undecodable"]):
        found += [
            ["plan-memory", model, "--explain", "--plot", "--hardware", "m3-ultra-512*2"],
            ["plan-memory", model, "--json"],
            ["plan-memory", model, "--save", str(tmp_path / "saved")],
            ["plan-memory", model, "--svg", str(tmp_path / "svg")],
            ["quantize", model, "--to", str(tmp_path / NAME / "q"), "--bits", "4", "--dry-run"],
            ["quantize", model, "--to", str(tmp_path / "q"), "--bits", "4", "--dry-run", "--json"],
            ["download", model, "--json"],
            ["download", model],
            ["doctor", "--quick", "--model", model, "--json"],
        ]
    return [
        *found,
        ["plan-memory", NAME],
        ["plan-memory", models["name"], "--shop"],
        ["plan-memory", models["undecodable"], "--shop", "--json"],
        ["plan-memory", models["name"], "--cluster", "hostile"],
        ["plan-memory", models["name"], "--hardware", HOSTILE.replace("\0", "")],
        ["download", models["gguf"], "--to", str(tmp_path / NAME / "g")],
        ["launch", models["undecodable"]],
        ["launch", models["name"], "--nodes", NAME],
        ["launch", models["name"], "--plan", plan],
        ["launch", models["name"], "--plan", models["gguf"]],
        ["launch", models["headers"]],
        ["ps"], ["ps", "--json"],
        ["logs", "demo-1"], ["logs", "demo-1", "--json"], ["logs", NAME], ["stop", NAME],
        ["stop", "demo-2"], ["stop", "demo-3", "--json"], ["stop", "\udcff\udc9b"],
        ["cluster", "list"], ["cluster", "show", "hostile", "--offline"],
        ["cluster", "show", "hostile", "--offline", "--json"], ["cluster", "export", "hostile"],
        ["cluster", "show", NAME], ["cluster", "import", str(hostfile), "--name", "y", "--offline"],
        ["doctor", "--replay", str(record)], ["doctor", "--replay", str(record), "--json"],
        ["doctor", "--replay", models["name"]],
        ["chat", "--url", url, "-p", HOSTILE.replace("\0", "")],
        ["chat", "--url", url, "-p", "x", "--json"],
        ["chat", "--url", f"{url}/bad", "-p", "x"],
        ["chat", "--url", f"{url}/odd", "-p", "x"],
        ["chat", "--url", f"{url}/torn", "-p", "x"],
        ["chat", "--url", f"{url}/torn", "-p", "x", "--json"],
        ["chat", "--url", f"{url}/shape", "-p", "x"],
        ["chat", NAME, "--url", url, "-p", "x"],
        ["chat", "--url", NAME, "-p", "x"],
        ["bench", "--url", url, "-p", "8", "-n", "8"],
        ["bench", "--url", f"{url}/bad", "-p", "8", "-n", "8"],
        ["nosuch" + NAME], ["ps", "--" + NAME],
    ]  # fmt: skip


def run(commands: list[list[str]], tmp_path: Path, streams: dict[str, Any]) -> tuple[int, Any]:
    script, words = tmp_path / "child.py", tmp_path / "commands.json"
    script.write_text(CHILD)
    words.write_text(json.dumps(commands))
    process = subprocess.Popen(
        [sys.executable, str(script), str(words)],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:surrogateescape", "TERM": "xterm-256color"},
        **streams,
    )
    return process.pid, process


def pieces(data: bytes, count: int) -> list[tuple[str, int]]:
    text = data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    parts = re.split(f"\n{MARK}(\\d+)\n", text)
    assert len(parts) == 2 * count + 1, text[-2000:]
    return [(parts[2 * index], int(parts[2 * index + 1])) for index in range(count)]


def problems(words: list[str], text: str, code: int) -> list[str]:
    found = [f"status {code}"] if code not in (0, 1, 2, 3, 4, 5) else []
    if unsafe := UNSAFE.search(text):
        found.append(f"writes {unsafe.group()!r}")
    # An answer of a model may contain any lines.
    if words[0] != "chat" and any(line.startswith(FALSE) for line in text.splitlines()):
        found.append("writes a false line")
    if "Traceback" in text:
        found.append("writes a traceback")
    return [f"{words} {problem}: {text!r}" for problem in found]


def test_pipes(commands: list[list[str]], tmp_path: Path) -> None:
    _, process = run(commands, tmp_path, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE})
    out, err = process.communicate(timeout=240)
    written = zip(commands, pieces(out, len(commands)), pieces(err, len(commands)), strict=True)
    found = []
    for words, (text, code), (noise, _) in written:
        found += problems(words, text, 0) + problems(words, noise, code)
        if "--json" in words and text:
            documents = text.splitlines() if words[0] == "logs" else [text]
            for document in documents:
                json.loads(document)
    assert not found, "\n".join(found)


def test_a_terminal(commands: list[list[str]], tmp_path: Path) -> None:
    commands = [words for words in commands if not {"--json", "--shop"} & set(words)]
    master, slave = pty.openpty()
    _, process = run(commands, tmp_path, {"stdout": slave, "stderr": slave})
    os.close(slave)
    data = b""
    try:
        while chunk := os.read(master, 2**16):
            data += chunk
    except OSError:  # EIO: the other side is closed
        pass
    os.close(master)
    assert process.wait(10) == 0
    text = data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    parts = re.split(f"(?:\n{MARK}(\\d+)\n)+", text)
    found = [STYLE.sub("", part) for part in parts[::2]]
    assert len(parts) == 2 * len(commands) + 1
    shown = zip(commands, found, parts[1::2], strict=False)
    wrong = [line for words, text, code in shown for line in problems(words, text, int(code))]
    assert not wrong, "\n".join(wrong)
