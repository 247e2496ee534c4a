"""Calls as models of each family write them."""

from __future__ import annotations

import json

from k2cli.server.output.known_formats import TOOL_FORMATS
from tests.server.output.families import K2_SECTION, k2_call


def _raw(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tagged(arguments: dict[str, object], form: str) -> str:
    """Write arguments, with ``{key}``, ``{value}``, ``{is_text}`` and ``{kind}`` in a form."""
    return "".join(
        form.format(
            key=key,
            value=_raw(value),
            is_text=str(isinstance(value, str)).lower(),
            kind="string" if isinstance(value, str) else "number",
        )
        for key, value in arguments.items()
    )


_DSML = (
    '<｜DSML｜invoke name="{}">\n',
    '<｜DSML｜parameter name="{key}" string="{is_text}">{value}</｜DSML｜parameter>\n',
    "</｜DSML｜invoke>\n",
)
_PAIRS = ("{}\n", "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n", "")
_LONGCAT = tuple(part.replace("arg_", "longcat_arg_") for part in _PAIRS)
_TAGS = {
    "kimi_k3": (
        '<|open|>call tool="{}" index="1"<|sep|>',
        '<|open|>argument key="{key}" type="{kind}"<|sep|>{value}<|close|>argument<|sep|>',
        "<|close|>call<|sep|>",
    ),
    "deepseek_v32": _DSML,
    "deepseek_v4": _DSML,
    "qwen3_coder": (
        "<function={}>\n",
        "<parameter={key}>\n{value}\n</parameter>\n",
        "</function>\n",
    ),
    "minimax_m2": (
        '<invoke name="{}">\n',
        '<parameter name="{key}">{value}</parameter>\n',
        "</invoke>\n",
    ),
    "minicpm5": ('<function name="{}">', '<param name="{key}">{value}</param>', "</function>"),
    "muse_spark": (
        '<atem:invoke name="{}">',
        '<atem:parameter name="{key}">{value}</atem:parameter>',
        "</atem:invoke>",
    ),
    "glm47": _PAIRS,
    "laguna": _PAIRS,
    "longcat": _LONGCAT,
}
_SECTIONS = {
    "kimi_k3": ("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
    "deepseek_v32": ("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    "deepseek_v4": ("<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"),
    "minimax_m2": ("<minimax:tool_call>\n", "</minimax:tool_call>"),
    "minicpm5": ("", ""),
    "muse_spark": ("<atem:function_calls>", "</atem:function_calls>"),
    "longcat": ("<longcat_tool_call>", "</longcat_tool_call>"),
}


def written(parser: str, name: str, arguments: dict[str, object]) -> str:
    """Write a call as models of a family do."""
    if parser in _TAGS:
        begin, each, end = _TAGS[parser]
        before, after = _SECTIONS.get(parser, ("<tool_call>", "</tool_call>"))
        before += "\n" if parser == "qwen3_coder" else ""
        return f"{before}{begin.format(name)}{_tagged(arguments, each)}{end}{after}"
    body = json.dumps(arguments, ensure_ascii=False)
    python = ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())
    match parser:
        case "kimi_k2":
            return K2_SECTION.format(k2_call(f"functions.{name}:7", body))
        case "deepseek_v3":
            begin = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
            end = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            return f"{begin}{name}<｜tool▁sep｜>{body}{end}"
        case "json_tools":
            return f'<tool_call>\n{{"name": "{name}", "arguments": {body}}}\n</tool_call>'
        case "llama3_json":
            return f'{{"name": "{name}", "parameters": {body}}}'
        case "mistral":
            return f"[TOOL_CALLS]{name}[ARGS]{body}"
        case "harmony":
            header = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
            return f"{header}{body}<|call|>"
        case "pythonic":
            return f"<|tool_call_start|>[{name}({python})]<|tool_call_end|>"
        case "llama4_pythonic":
            return f"[{name}({python})]"
    ordered = dict(sorted(arguments.items()))
    gemma, quote = _tagged(ordered, "{key}:{value},").removesuffix(","), '<|"|>'
    if parser == "function_gemma":
        quote = "<escape>"
    for word in (value for value in arguments.values() if isinstance(value, str)):
        gemma = gemma.replace(f":{word}", f":{quote}{word}{quote}")
    marks = TOOL_FORMATS[parser].tokens
    return f"{marks[0]}call:{name}{{{gemma}}}{marks[1]}"
