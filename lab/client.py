"""A client that sends one streamed request to a run's API from a host of the lab.

Imports nothing of k2. Prints ``first`` at the first piece of the answer, then ``end`` and the
result that the client received.
"""

from __future__ import annotations

import http.client
import json
import sys


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _read(answer: http.client.HTTPResponse) -> str:
    begun = False
    told = "the connection was closed"
    for raw in answer:
        line = raw.decode(errors="replace").strip()
        if not line.startswith("data: "):
            continue
        content = line.removeprefix("data: ")
        if content == "[DONE]":
            return "done"
        piece = json.loads(content)
        if "error" in piece:
            told = f"error: {piece['error'].get('message', piece['error'])}"
        elif not begun and piece.get("choices"):
            begun = True
            _say("first")
    return told


def main() -> None:
    """Run ``client.py PORT WORDS MAX_TOKENS``; the prompt has ``WORDS`` words."""
    port, words, most = (int(part) for part in sys.argv[1:])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"prompt": "word " * words, "max_tokens": most, "stream": True}
    body["temperature"] = 0.0
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            _say(f"end status {answer.status}: {answer.read(300).decode(errors='replace')}")
            return
        _say(f"end {_read(answer)}")
    except (OSError, http.client.HTTPException) as error:
        _say(f"end {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
