"""An MCP server that misbehaves in the way that its argument names; it uses no library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

HOW = sys.argv[1]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {}}
ESCAPE = "\x1b]0;owned\x07\x1b[2Jhidden\u202e\u200bend"


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def tools() -> list[Any]:
    plain = {"name": "go", "description": "Go.", "inputSchema": SCHEMA}
    match HOW:
        case "names":
            deep: dict[str, Any] = {"type": "object"}
            for _ in range(40):
                deep = {"type": "object", "properties": {"x": deep}}
            return [
                plain,
                plain,
                {"name": ESCAPE, "description": ESCAPE, "inputSchema": SCHEMA},
                {"name": "a b", "inputSchema": SCHEMA},
                {"name": "a.b", "inputSchema": SCHEMA},
                {"name": "", "inputSchema": SCHEMA},
                {"name": "x" * 5000, "inputSchema": SCHEMA},
                {"name": "nan", "inputSchema": {**SCHEMA, "default": float("nan")}},
                {"name": "digits", "inputSchema": {**SCHEMA, "default": 10**40}},
                {"name": "deep", "inputSchema": deep},
                {"name": "big", "inputSchema": {**SCHEMA, "description": "x" * 10**6}},
            ]
        case "many":
            return [{**plain, "name": f"tool{number}"} for number in range(5000)]
        case "malformed-list":
            return [{"name": 3}, "text"]
    return [plain]


def answer(call: dict[str, Any]) -> None:
    text = "done"
    match HOW:
        case "hang":
            time.sleep(3600)
        case "die":
            sys.stderr.write("about to die\n")
            sys.stderr.flush()
            os._exit(3)
        case "huge":
            text = "x" * 10**6
        case "endless-line":
            while True:
                sys.stdout.write("x" * 2**20)
        case "requests":
            for number in range(10**9):
                send({"id": f"r{number}", "method": "ping"})
        case "blocks":
            block = {"type": "text", "text": ""}
            send({"id": call["id"], "result": {"content": [block] * 150_000}})
            return
        case "malformed":
            send({"id": call["id"], "result": {"content": "text"}})
            return
        case "no-message":
            sys.stdout.write('{"no": "message"}\n')
            sys.stdout.flush()
            return
        case "rubbish":
            for _ in range(5):
                sys.stdout.write("loading...\n\x00\xff{{{\n[1]\n")
        case "escape":
            text = ESCAPE
        case "noise":
            sys.stderr.write(("\x1b[2J" + "noise " * 1000 + "\n") * 100)
            sys.stderr.flush()
        case "environment":
            text = " ".join(sorted(os.environ))
    send({"id": call["id"], "result": {"content": [{"type": "text", "text": text}]}})


def main() -> None:
    if HOW == "silent":
        time.sleep(3600)
    if HOW == "stays":  # it ignores every request to end, and so does what it started
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(999)"
        )
        subprocess.Popen([sys.executable, "-c", child, "k2-test-stays"], start_new_session=True)
    for line in sys.stdin:
        message = json.loads(line)
        match message.get("method"):
            case "initialize":
                result = {
                    "protocolVersion": message["params"]["protocolVersion"],
                    "capabilities": {"tools": {}},
                    "serverInfo": {"name": ESCAPE, "version": "1"},
                }
                send({"id": message["id"], "result": result})
            case "tools/list":
                send({"id": message["id"], "result": {"tools": tools()}})
            case "tools/call":
                answer(message)
            case _ if "id" in message:
                send({"id": message["id"], "error": {"code": -32601, "message": "unknown"}})
    while HOW == "stays":
        time.sleep(1)


main()
