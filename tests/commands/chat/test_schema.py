"""``k2 chat --schema`` against a server that answers what the test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from k2cli.chat.schema import AnswerSchema, read_schema
from k2cli.errors import K2Error, UsageError
from tests.server.commands import run_k2
from tests.support.terminal import Terminal

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^\\p{L}+$"}, "people": {"minimum": 0}},
    "required": ["city"],
    "additionalProperties": False,
}
DRAFT_7, DRAFT_2020 = "//json-schema.org/draft-07/schema", "//json-schema.org/draft/2020-12/schema"
# A carriage return is whitespace between the parts of a JSON text.
ANSWER = '\n{"city":\r\n "Paris", "people": 2.10}\n'


@dataclass
class OtherServer:
    """Answers of an OpenAI-compatible server, and the bodies that it got."""

    url: str = ""
    deltas: list[dict[str, str]] = field(default_factory=list)
    reason: str = "stop"
    refusal: dict[str, Any] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[OtherServer]:
    other = OtherServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send("application/json", {"data": [{"id": "m", "owned_by": "someone"}]})

        def do_POST(self) -> None:
            other.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if other.refusal is not None:
                self._send("application/json", {"error": other.refusal}, 400)
                return
            events = [{"choices": [{"delta": delta}]} for delta in other.deltas]
            events.append({"choices": [{"delta": {}, "finish_reason": other.reason}]})
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            self._send("text/event-stream", "".join(lines) + "data: [DONE]\n\n")

        def _send(self, kind: str, content: Any, status: int = 200) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    other.url = f"http://127.0.0.1:{served.server_port}"
    try:
        yield other
    finally:
        served.shutdown()
        served.server_close()


@pytest.fixture
def schema_file(tmp_path: Path) -> str:
    path = tmp_path / "city.json"
    path.write_text("\ufeff" + json.dumps(SCHEMA))
    return str(path)


def test_stdout_has_the_json_alone(server: OtherServer, schema_file: str) -> None:
    thought = {"reasoning_content": "They ask for Paris."}
    server.deltas = [thought, *({"content": letter} for letter in ANSWER)]
    done = run_k2("chat", "--url", server.url, "-p", "A city", "--schema", schema_file)
    assert (done.returncode, done.stdout) == (0, '{"city": \n "Paris", "people": 2.10}\n')
    assert "They ask" not in done.stderr
    form = {"name": "answer", "schema": SCHEMA, "strict": True}
    assert server.bodies[0]["response_format"] == {"type": "json_schema", "json_schema": form}
    done = run_k2(
        "chat", "--url", server.url, "-p", "A city", "--schema", "-", "--json",
        stdin=json.dumps(SCHEMA),
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert document["parsed"] == {"city": "Paris", "people": 2.1}
    assert document["answer"] == ANSWER
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "A city"}]
    assert server.bodies[1]["response_format"] == server.bodies[0]["response_format"]


def test_control_characters_are_escaped_and_keep_the_value(server: OtherServer) -> None:
    server.deltas = [{"content": '"\x9b31m \u202e"'}]
    done = run_k2("chat", "--url", server.url, "-p", "x", "--schema", "-", stdin="{}")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert json.loads(done.stdout) == "\x9b31m \u202e"


@pytest.mark.parametrize(
    ("answer", "reason", "words"),
    [
        ('{"city": "Paris"}', "length", "cut off at the token limit"),
        ('{"city": "Paris"}', "content_filter", "ended with 'content_filter'"),
        ("Here it is: {}", "stop", "not JSON (line 1, column 1: expecting value)"),
        ('{"people": NaN}', "stop", "not JSON (NaN is not a JSON value)"),
        ('{"city": "Paris", "people": -1}', "stop", "at /people: -1 is less than the minimum"),
        ("[" * 100_000, "stop", "nested too deeply"),
        ("", "stop", "not JSON"),
    ],
)
def test_an_answer_that_does_not_obey_is_an_error(answer: str, reason: str, words: str) -> None:
    with pytest.raises(K2Error) as raised:
        AnswerSchema("city.json", SCHEMA).parse(answer, reason)
    assert words in raised.value.message
    assert ("ignored the schema" in raised.value.message) == (reason == "stop")


@pytest.mark.parametrize(
    ("schema", "answer", "obeys"),
    [
        ({"items": [{"type": "string"}]}, "[1]", False),
        ({"items": [{"type": "string"}]}, '["a", 1]', True),
        ({"exclusiveMinimum": True, "minimum": 0}, "0", False),
        ({"$schema": f"https:{DRAFT_7}", "items": [{}, False]}, "[1, 1]", False),
        ({"$schema": f"http:{DRAFT_2020}", "prefixItems": [False]}, "[1]", False),
        ({"$schema": "http://nobody/knows", "minimum": 1}, "0", False),
    ],
)  # fmt: skip
def test_schemas_of_older_drafts(tmp_path: Path, schema: Any, answer: str, obeys: bool) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(schema))
    read = read_schema(str(path))
    if obeys:
        assert read.parse(answer, "stop") == json.loads(answer)
        return
    with pytest.raises(K2Error, match="does not obey"):
        read.parse(answer, "stop")


def test_such_an_answer_ends_with_1_and_is_not_printed(
    server: OtherServer, schema_file: str
) -> None:
    options = ["--url", server.url, "-p", "x", "--schema", schema_file]
    server.deltas, server.reason = [{"content": '{"city": "Par'}], "length"
    done = run_k2("chat", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cut off at the token limit" in done.stderr
    done = run_k2("chat", *options, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["answer"], document["parsed"]) == (1, '{"city": "Par', None)
    assert "cut off at the token limit" in document["error"]
    server.deltas, server.reason = [{"content": "Paris"}], "stop"
    done = run_k2("chat", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ignored the schema" in done.stderr


def test_a_refused_schema_is_a_usage_error(server: OtherServer, schema_file: str) -> None:
    options = ["--url", server.url, "-p", "x", "--schema", schema_file]
    place = "response_format.json_schema.schema"
    server.refusal = {"message": f"{place}: at /properties: too much", "param": place}
    done = run_k2("chat", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "refused the schema: response_format.json_schema.schema: at /prop" in done.stderr
    server.refusal = {"message": "seed: no", "param": "seed"}
    assert run_k2("chat", *options).returncode == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        (b'{\n  "type": string}', "not JSON: line 2, column 11: expecting value"),
        (b"", "not JSON: line 1, column 1"),
        (b"[" * 50_000, "not JSON: it is nested too deeply"),
        (b"9" * 5_000, "not JSON"),
        (b"[1]", "must be a JSON object, and is an array"),
        (b"null", "must be a JSON object, and is null"),
        (b'{"minimum": NaN}', "NaN is not a JSON value"),
        (b'{"a": "\xff"}', "not UTF-8: the byte at offset 7"),
        (b" " * 2**20 + b"{}", "larger than 1048576 bytes"),
        (b'{"properties": {"a/b": {"type": "strin"}}}', "at /properties/a~1b/type: 'strin'"),
        (b'{"$schema": "http://json-schema.org/draft-07/schema#", "type": 1}', "at /type: 1"),
    ],
)
def test_a_wrong_file_is_a_usage_error(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_schema(str(path))
    assert words in raised.value.message
    assert str(path) in raised.value.message


def test_usage_errors_end_with_2(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("{")
    for options in (["-p", "x", "--schema", str(path)], ["--schema", "-"]):
        done = run_k2("chat", "--url", "http://127.0.0.1:9", *options, stdin="{}")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_nothing_is_fetched_for_a_reference(server: OtherServer) -> None:
    """A schema that cannot be checked here is left to the server."""
    server.deltas = [{"content": "1"}]
    schema = json.dumps({"$ref": f"{server.url}/schema"})
    done = run_k2("chat", "--url", server.url, "-p", "x", "--schema", "-", stdin=schema)
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_each_answer_on_a_terminal_is_checked(
    server: OtherServer, schema_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR")
    with Terminal("chat", "--url", server.url, "--schema", schema_file) as terminal:
        terminal.prompt()
        server.deltas = [{"content": '{"city": "**Paris**"}'}]
        terminal.enter("A city")
        terminal.expect('{"city": "**Paris**"}')
        terminal.prompt()
        server.deltas = [{"content": '{"town": "Rome"}'}]
        terminal.enter("Another")
        terminal.expect('{"town": "Rome"}')
        terminal.expect("does not obey")
        terminal.prompt()
        terminal.type("\x04")
        assert terminal.close() == 0
    assert [body["response_format"]["type"] for body in server.bodies] == ["json_schema"] * 2
