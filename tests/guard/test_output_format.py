"""Guard and reader processes find the same output format, and the options of a launch count."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from k2cli.errors import K2Error
from k2cli.guard.output_format import output_format_of
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.server.client_request import OutputOptions
from k2cli.server.killable_reader import KillableReader
from k2cli.server.reader_messages import ReaderSettings
from k2cli.server.reader_queues import ProcessReader
from lab.toy_k2.template import K25_TEMPLATE

TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.fixture
def k25(toy_k2: Path, tmp_path: Path) -> Path:
    """A model without weights whose template is that of Kimi K2.5."""
    folder = tmp_path / "k25"
    shutil.copytree(toy_k2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(K25_TEMPLATE)
    return folder


def test_the_template_decides_unless_a_launch_does(k25: Path) -> None:
    tokenizer = Tokenizer.load(k25)
    own = output_format_of(tokenizer, None, None)
    assert (own.tools and own.tools.name, own.reasoning and own.reasoning.name) == (
        "kimi_k2",
        "think",
    )
    markers = own.marker_tokens(OutputOptions(True, TOOLS))
    assert markers[tokenizer.token_id("<|tool_call_begin|>") or -1] == "<|tool_call_begin|>"
    assert "<|im_end|>" not in markers.values()
    assert own.marker_tokens(OutputOptions(True)).keys() < markers.keys()
    off = output_format_of(tokenizer, "none", "none")
    assert (off.tools, off.reasoning) == (None, None)
    other = output_format_of(tokenizer, "hermes", "mistral")
    assert other.tools is not None
    assert other.tools.name == "json_tools"
    with pytest.raises(K2Error, match="no tool parser named 'x'"):
        output_format_of(tokenizer, "x", None)


def test_a_name_in_the_tokenizers_config_decides(k25: Path) -> None:
    path = k25 / "tokenizer_config.json"
    named = {**json.loads(path.read_text()), "tool_parser_type": "qwen3_coder"}
    path.write_text(json.dumps(named))
    chosen = output_format_of(Tokenizer.load(k25), None, None)
    assert chosen.tools is not None
    assert chosen.tools.name == "qwen3_coder"


def test_a_reader_process_knows_where_an_answer_begins(k25: Path) -> None:
    settings = ReaderSettings(str(k25), "toy", 4096, 1.0, 1.0, 0, ("alias",))

    async def outputs(bodies: list[dict[str, Any]], settings: ReaderSettings) -> list[Any]:
        first = KillableReader(settings, ())
        reader = ProcessReader(first, first.another())
        try:
            read = [
                await reader.read("chat", json.dumps({"model": "alias", **body}).encode())
                for body in bodies
            ]
        finally:
            await reader.close()
        return [each.engine_request and each.engine_request.output for each in read]

    ask = {"role": "user", "content": "What does <think> mean?"}
    begun = {"role": "assistant", "content": "It means"}
    bodies = [
        {"messages": [ask], "tools": TOOLS, "parallel_tool_calls": False},
        {"messages": [ask], "reasoning_effort": "none"},
        {"messages": [ask, begun]},
        {"messages": [ask], "include_reasoning": False},
    ]
    assert asyncio.run(outputs(bodies, settings)) == [
        OutputOptions(True, TOOLS, False, begins_in_reasoning=True),
        OutputOptions(True),
        OutputOptions(True),
        OutputOptions(True, begins_in_reasoning=True, include_reasoning=False),
    ]
    off = ReaderSettings(str(k25), "toy", 4096, 1.0, 1.0, 0, ("alias",), reasoning_parser="none")
    assert asyncio.run(outputs(bodies[3:], off)) == [OutputOptions(True, include_reasoning=False)]


@pytest.mark.parametrize("tool_parser", [None, "x"])
def test_a_run_is_ready_only_if_its_process_reads_requests(
    k25: Path, tool_parser: str | None
) -> None:
    """With a parser that does not exist, the process loads the model's files and ends then."""
    settings = ReaderSettings(str(k25), "toy", 4096, 1.0, 1.0, 0, tool_parser=tool_parser)

    async def check() -> None:
        first = KillableReader(settings, ())
        reader = ProcessReader(first, first.another())
        try:
            await first.load()
            await reader.check()
        finally:
            await reader.close()

    if tool_parser is None:
        asyncio.run(check())
    else:
        with pytest.raises(K2Error, match=r"requests cannot be read: .* process .* ends"):
            asyncio.run(check())
