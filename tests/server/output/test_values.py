"""Generated calls, compared with what mlx-lm's parser makes of the whole text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from html import escape
from typing import Any

import pytest

from k2cli.server.output.mlx_lm_calls import parse_whole
from tests.server.output.families import TOOLS, k2_call
from tests.server.output.parsing import parse, value

TEXTS = [
    "",
    "12",
    "01234",
    "3.5",
    "true",
    "null",
    "None",
    "[1, 2]",
    '{"a": {"b": null}}',
    "{'a': 1}",
]
TEXTS += [
    "a\nb\n",
    "  padded ",
    '"quoted"',
    "\\n",
    "é 巴黎 😀",
    "a < b && c > d",
    "1e999",
    "x=1, y=2",
]
TEXTS += [
    "(1, 2)",
    "-5",
    "TRUE",
    "0",
    "<b>bold</b>",
    "```\ncode\n```",
    "----------------",
    "'",
    "NaN",
]


def _arguments(source: random.Random) -> dict[str, str]:
    names = ["path", "limit", "city", "metric", "filters", "tags", "unknown"]
    return {name: source.choice(TEXTS) for name in source.sample(names, source.randrange(4))}


def _tagged(
    arguments: dict[str, str], before: str, middle: str, after: str, quote: Callable[[str], str]
) -> str:
    return "".join(f"{before}{quote(key)}{middle}{text}{after}" for key, text in arguments.items())


def _quoted(text: str) -> str:
    return f'"{escape(text)}"'


def _qwen(name: str, arguments: dict[str, str]) -> str:
    inner = _tagged(arguments, "<parameter=", ">\n", "\n</parameter>\n", str)
    return f"<function={name}>\n{inner}</function>"


def _minimax(name: str, arguments: dict[str, str]) -> str:
    inner = _tagged(arguments, "<parameter name=", ">", "</parameter>\n", _quoted)
    return f'<invoke name="{name}">\n{inner}</invoke>'


def _glm(name: str, arguments: dict[str, str]) -> str:
    tags = ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
    return f"{name}\n" + _tagged(arguments, *tags, str)


def _k3(name: str, arguments: dict[str, str]) -> str:
    inner = "".join(
        f'<|open|>argument key="{key}" type="{kind}"<|sep|>{text}<|close|>argument<|sep|>'
        for number, (key, text) in enumerate(arguments.items())
        for kind in (("string", "number", "object")[number % 3],)
    )
    return f'<|open|>call tool="{name}" index="1"<|sep|>{inner}<|close|>call<|sep|>'


def _muse(name: str, arguments: dict[str, str]) -> str:
    inner = _tagged(arguments, "<atem:parameter name=", ">", "</atem:parameter>", _quoted)
    return f'<atem:invoke name="{name}">{inner}</atem:invoke>'


def _minicpm(name: str, arguments: dict[str, str]) -> str:
    return f'"{name}">' + _tagged(arguments, "<param name=", ">", "</param>", _quoted)


def _k2(name: str, arguments: dict[str, str]) -> str:
    return k2_call(f"functions.{name}:0", json.dumps(arguments, indent=1))


def _json(name: str, arguments: dict[str, str]) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def _mistral(name: str, arguments: dict[str, str]) -> str:
    return f"{name}[ARGS]{json.dumps(arguments)}"


WHOLE: dict[str, tuple[str, str, Callable[[str, dict[str, str]], str]]] = {
    "qwen3_coder": ("<tool_call>\n", "\n</tool_call>", _qwen),
    "minimax_m2": ("<minimax:tool_call>\n", "\n</minimax:tool_call>", _minimax),
    "glm47": ("<tool_call>", "</tool_call>", _glm),
    "kimi_k3": ("<|open|>tools<|sep|>", "<|close|>tools<|sep|>", _k3),
    "muse_spark": ("<atem:function_calls>", "</atem:function_calls>", _muse),
    "minicpm5": ("<function name=", "</function>", _minicpm),
    "kimi_k2": ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _k2),
    "json_tools": ("<tool_call>\n", "\n</tool_call>", _json),
    "mistral": ("[TOOL_CALLS]", "", _mistral),
}


def _as_json(found: Any) -> Any:
    """Write what JSON has no form for as text, as the parser does."""
    if isinstance(found, dict):
        return {key: _as_json(item) for key, item in found.items()}
    try:
        return json.loads(json.dumps(found, allow_nan=False))
    except (TypeError, ValueError):
        return str(found)


def _declared(parser: str, name: str, arguments: dict[str, str]) -> dict[str, str]:
    """Return the arguments that are declared as strings: they are what was written.

    mlx-lm reads ``null`` and, for some families, numbers in them.
    """
    if parser not in ("qwen3_coder", "minimax_m2", "glm47", "muse_spark", "minicpm5"):
        return {}
    (tool,) = (tool for tool in TOOLS if tool["function"]["name"] == name)
    kinds = tool["function"]["parameters"]["properties"]
    texts = {key: text for key, text in arguments.items() if kinds.get(key) == {"type": "string"}}
    return texts if parser == "qwen3_coder" else {key: text.strip() for key, text in texts.items()}


@pytest.mark.parametrize("parser", sorted(WHOLE))
def test_values_are_those_of_mlx_lm(parser: str) -> None:
    before, after, write = WHOLE[parser]
    source = random.Random(parser)
    compared = 0
    for _ in range(200):
        name = source.choice([tool["function"]["name"] for tool in TOOLS])
        arguments = _arguments(source)
        call = write(name, arguments)
        whole = parse_whole(parser, call, TOOLS)
        if not whole:
            continue  # one value makes mlx-lm refuse the call: see the tests of rules
        compared += 1
        found = parse(parser, before + call + after)
        declared = _declared(parser, name, arguments)
        assert [(call.name, value(call)) for call in found.calls] == [
            (call["name"], _as_json(call["arguments"]) | declared) for call in whole
        ]
        assert found.text == ""
    assert compared > 120
