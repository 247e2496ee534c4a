"""The log's line about each request, and the ids of requests."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from k2cli.protocol import PromptProgress, Tokens
from tests.server.requests import CHAT, QUESTION, SERVED, encode, events_of, post
from tests.server.scripted import finished
from tests.server.watched import watched

CANARY = "canary7f3a"
KEY = "k2-secret-of-the-run"
LINE = re.compile(r"(\w+) (\d+)((?: [a-z]+=[^ =]+)*)")


def fields_of(line: str) -> dict[str, str]:
    """The parts of a line, by name."""
    found = LINE.fullmatch(line)
    assert found is not None, line
    named = dict(word.split("=") for word in found[3].split())
    return {"dialect": found[1], "status": found[2], **named}


def test_a_line_has_the_counts_and_times_of_its_request() -> None:
    with watched() as server:
        tokens = [Tokens("", [letter]) for letter in encode("Paris")]
        server.engine.answer("Paris", size=1, reason="length")
        server.engine.enqueue([PromptProgress("", 2, 5, 2), *tokens, 0.2, ValueError("bug")])
        usage = post(server.url, {"messages": QUESTION}, **{"X-Request-Id": "my-id_1"}).json()
        assert post(server.url, {"prompt": "x"}, "/v1/completions").status_code == 500
        assert post(server.url, {"prompt": "x"}, "/v1/tokenize").status_code == 200
        server.wait(lambda: len(server.lines) == 3)
        whole, broken, counted = (fields_of(line) for line in server.lines)
        used = usage["usage"]
        assert (whole["dialect"], whole["status"], whole["id"]) == ("chat", "200", "my-id_1")
        assert (whole["in"], whole["out"]) == (
            str(used["prompt_tokens"]), str(used["completion_tokens"]),
        )  # fmt: skip
        assert (whole["cached"], whole["end"]) == ("1", "length")
        assert float(whole["total"].removesuffix("s")) >= float(whole["first"].removesuffix("s"))
        assert whole["rate"].endswith("/s")
        assert (broken["code"], broken["end"]) == ("internal_error", "failed")
        assert (broken["in"], broken["cached"], broken["out"]) == ("5", "2", "5")
        assert (counted["dialect"], counted["end"], "in" in counted) == (
            "tokenize", "completed", False,
        )  # fmt: skip


def test_a_line_says_how_many_tokens_were_guessed() -> None:
    """Answers of Messages and Responses have no field for it."""
    with watched() as server:
        for drafts in (8, 0):
            server.engine.enqueue(
                [Tokens("", encode("Paris")),
                 finished(5, draft_tokens=drafts, accepted_tokens=drafts and 5)]
            )  # fmt: skip
            assert post(server.url, {"messages": QUESTION}, "/v1/messages").status_code == 200
        server.wait(lambda: len(server.lines) == 2)
        guessed, plain = (fields_of(line) for line in server.lines)
        assert (guessed["drafts"], "drafts" in plain) == ("5/8", False)


def test_no_contents_and_no_keys_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    served = replace(SERVED, api_key=KEY)
    with watched(served) as server:
        right = {"Authorization": f"Bearer {KEY}"}
        conversation = [{"role": "user", "content": f"{CANARY} question"}]
        bodies = (
            {"messages": conversation, "user": CANARY, "metadata": {"a": CANARY}},
            {"messages": conversation, "model": CANARY},
            {"messages": CANARY},
            {"messages": conversation, CANARY: 1},
        )
        for path in (CHAT, "/v1/messages", "/v1/responses", f"/v1/{CANARY}"):
            for body in bodies:
                server.engine.answer(f"{CANARY} answer")
                post(server.url, body, path, **right)
                post(server.url, body, path, Authorization=f"Bearer {CANARY}")
        post(server.url, f'{{"messages": "{CANARY}', **right)
        server.wait(lambda: len(server.lines) == 4 * 4 * 2 + 1)
        log = "\n".join(server.lines)
        assert CANARY not in log
        assert KEY not in log
        for line in server.lines:
            fields_of(line)


def test_what_strangers_cause_are_equal_lines() -> None:
    """The journal folds equal lines, so that nobody without a key can fill the log."""
    with watched(replace(SERVED, api_key=KEY)) as server:
        for number in range(5):
            post(server.url, {"messages": QUESTION}, **{"X-Request-Id": f"stranger{number}"})
            server.get(f"/v1/models?{number}")
        server.wait(lambda: len(server.lines) == 10)
        assert set(server.lines) == {
            "chat 401 code=invalid_api_key end=unauthorized",
            "other 401 code=invalid_api_key end=unauthorized",
        }


@pytest.mark.parametrize("sent", ["0f8fad5b-d9cb-469f-a165-70867728950e", "a" * 128, "a.b:c/d=e"])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/nothing"])
def test_the_id_of_a_request_comes_back(sent: str, path: str) -> None:
    with watched() as server:
        server.engine.answer("x")
        got = post(server.url, {"messages": QUESTION, "max_tokens": 5}, path,
                   **{"X-Request-Id": sent})  # fmt: skip
        assert got.headers["x-request-id"] == sent
        assert got.headers.get("request-id") == (sent if path == "/v1/messages" else None)


@pytest.mark.parametrize("sent", ["", "a" * 129, "a b", "a\tb", 'a"b', "é", "a,b", "<x>"])
def test_what_cannot_be_an_id_is_replaced(sent: str) -> None:
    with watched() as server:
        server.engine.answer("x")
        server.engine.answer("x")
        ids = set()
        for _ in range(2):
            headers = {"X-Request-Id": sent.encode("latin-1")}
            got = post(server.url, {"messages": QUESTION}, **headers)  # type: ignore[arg-type]
            assert got.status_code == 200
            ids.add(got.headers["x-request-id"])
            assert re.fullmatch(r"req_[0-9a-f]{32}", got.headers["x-request-id"])
        assert len(ids) == 2
        server.wait(lambda: len(server.lines) == 2)
        assert {fields_of(line)["id"] for line in server.lines} == ids


def test_a_stream_has_its_id_and_its_line() -> None:
    with watched() as server:
        server.engine.answer("streamed")
        assert events_of(server.url, {"messages": QUESTION})[-1] == "data: [DONE]"
        server.wait(lambda: len(server.lines) == 1)
        line = fields_of(server.lines[0])
        assert (line["out"], line["end"], line["status"]) == ("8", "stop", "200")
