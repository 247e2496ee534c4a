"""Send every field that Anthropic's client offers and compare with docs/reference/api.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

from anthropic.types.beta import message_count_tokens_params as count_params
from anthropic.types.beta import message_create_params as create_params

from tests.server.requests import QUESTION, post
from tests.server.scripted import ScriptedEngine

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md").read_text()
PATH = "/v1/messages"
OLDER = {"temperature", "top_k", "top_p"}
IMAGE = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
# A value that is taken, or for ``refuses`` one that is not.
VALUES: dict[str, Any] = {
    "max_tokens": 9,
    "stop_sequences": ["ris"],
    "stream": True,
    "system": "Be brief",
    "tools": [{"name": "f", "input_schema": {}}],
    "temperature": 0.5,
    "tool_choice": {"type": "any"},
    "top_k": 3,
    "top_p": 0.5,
}
# One that is taken, and one that is refused.
PARTS: dict[str, tuple[Any, Any]] = {
    "messages": (QUESTION, IMAGE),
    "model": ("toy", "claude"),
    "context_management": ({"edits": [{"type": "clear_thinking_20251015"}]}, {"edits": [{}]}),
    "mcp_servers": ([], [{"type": "url"}]),
    "output_config": ({"effort": "high"}, {"task_budget": {}}),
    "thinking": ({"type": "disabled"}, {"type": "between_tools"}),
}


# A field beside which alone another one works.
NEEDED: dict[str, dict[str, Any]] = {"tool_choice": {"tools": [{"name": "f", "input_schema": {}}]}}


def _table() -> dict[str, str]:
    section = PAGE.split("## Messages\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (does|part|ignores|refuses) \|", section, re.MULTILINE))


def test_each_field_is_honoured_ignored_or_refused_as_documented(
    engine: ScriptedEngine, url: str
) -> None:
    def ask(fields: dict[str, Any]) -> tuple[int, str, Any]:
        engine.answer("Paris")
        response = post(url, {"messages": QUESTION, **fields}, PATH)
        text = re.sub(r"(msg|req)_[0-9a-f]+", "", response.text)
        if response.status_code != 200:
            return response.status_code, text, None
        request = engine.submitted[-1]
        members = {name: getattr(request, name) for name in request.__struct_fields__}
        return 200, text, {**members, "request_id": ""}

    table = _table()
    offered = set(get_type_hints(create_params.MessageCreateParamsStreaming))
    assert set(table) == offered | OLDER
    assert set(get_type_hints(count_params.MessageCountTokensParams)) <= set(table)
    for field, kind in table.items():
        needed = NEEDED.get(field, {})
        plain = ask(needed)
        taken, refused = PARTS.get(field, (VALUES.get(field, "any"), VALUES.get(field, "any")))
        if kind != "refuses":
            got = ask(needed | {field: taken})
            assert got[0] == 200, (field, got)
            if kind != "part":
                assert (got == plain) == (kind == "ignores"), field
        if kind in ("refuses", "part"):
            status, text, _ = ask({field: refused})
            assert status == (404 if field == "model" else 400), field
            assert field in text, (field, text)
