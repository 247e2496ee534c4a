"""What agents were recorded to send is accepted, field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from k2cli.server.served_model import ServedModel
from tests.server.scripted import ScriptedEngine, serving

RECORDED = Path(__file__).resolve().parents[1] / "data" / "agents"
NAMES = ("opencode", "cline", "aider", "claude", "claude-toolsearch", "codex")
SERVED = ServedModel("kimi-k2", context_length=131_072, created=1_700_000_000)


def _requests(name: str) -> list[dict[str, Any]]:
    requests = json.loads((RECORDED / f"{name}.json").read_text())["requests"]
    assert requests
    return [one for one in requests if one["method"] == "POST"]


@pytest.mark.parametrize("name", NAMES)
def test_each_recorded_request_is_answered(name: str) -> None:
    engine = ScriptedEngine()
    with serving(engine, SERVED) as url, httpx.Client(base_url=url, verify=False) as client:
        for request in _requests(name):
            engine.answer("Done.")
            headers = {
                field: value
                for field, value in request["headers"].items()
                if field not in ("host", "content-length")
            }
            answer = client.post(request["path"], json=request["body"], headers=headers)
            assert answer.status_code == 200, answer.text
            assert "data: " in answer.text
            # Responses have a member for an error, which is null.
            assert "error" not in answer.text.replace('"error":null', "")
    assert len(engine.submitted) == len(_requests(name))


def test_recordings_hold_nothing_of_the_machine() -> None:
    """Addresses and paths are those that the recorder put in."""
    for path in sorted(RECORDED.glob("*.json")):
        text = path.read_text()
        for own in ("/tmp/", "/work/", "fc-v"):
            assert own not in text, (path.name, own)
