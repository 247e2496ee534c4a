"""The formats of reasoning and of tool calls that models use, by name."""

from __future__ import annotations

import re

from k2cli.server.output import harmony
from k2cli.server.output.emitter import MAX_NAME_LETTERS, short_call_id
from k2cli.server.output.json_calls import (
    HeaderFormat,
    JsonObjects,
    deepseek_header,
    header_calls,
    hermes_calls,
    k2_header,
    read_value,
)
from k2cli.server.output.mlx_lm_calls import emit_whole, whole_calls
from k2cli.server.output.parser import ReasoningFormat
from k2cli.server.output.source import WHITESPACE, Machine, Reading
from k2cli.server.output.tool_format import CallContext, ToolFormat
from k2cli.server.output.typed_calls import pair_calls, typed_calls
from k2cli.server.output.typed_formats import DSML, PAIR_FORMATS, TYPED_FORMATS

# --- reasoning ---

_XTML_TOKENS = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")


def _single(name: str, opens: str, close: str, begins_inside: bool = False) -> ReasoningFormat:
    return ReasoningFormat(name, opens, close, (opens, close), begins_inside)


REASONING_FORMATS: dict[str, ReasoningFormat] = {
    form.name: form
    for form in (
        _single("think", "<think>", "</think>"),
        _single("think_open", "<think>", "</think>", begins_inside=True),
        _single("longcat", "<longcat_think>", "</longcat_think>"),
        _single("think_marks", "<|think:start|>", "<|think:end|>"),
        _single("mistral", "[THINK]", "[/THINK]"),
        _single("seed", "<seed:think>", "</seed:think>"),
        ReasoningFormat("gemma4", "<|channel>thought", "<channel|>", ("<|channel>", "<channel|>")),
        ReasoningFormat(harmony.NAME, "<|channel|>analysis<|message|>", "<|end|>", harmony.TOKENS),
        ReasoningFormat(
            "kimi_k3",
            "<|open|>think<|sep|>",
            "<|close|>think<|sep|>",
            _XTML_TOKENS,
            dropped=(
                "<|open|>response<|sep|>",
                "<|close|>response<|sep|>",
                "<|close|>message<|sep|>",
            ),
        ),
    )
}

# --- Mistral: [TOOL_CALLS]name[ARGS]{...}, or a list of objects ---

_MISTRAL_OPEN, _MISTRAL_ARGUMENTS, _MISTRAL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_MISTRAL_NAME = re.compile(r"[^\s\[\]{}]+")


def _mistral_calls(context: CallContext, marker: str) -> Reading:
    source, emitter = context.source, context.emitter
    opens, arguments, call_id = context.markers(_MISTRAL_OPEN, _MISTRAL_ARGUMENTS, _MISTRAL_ID)
    if (yield from source.skip(WHITESPACE)) in ("[", "{") and not emitter.full:
        inner = Machine(context.codes, JsonObjects(context).read)
        yield from source.until((), inner.feed)
        inner.finish()
        return
    before = _MISTRAL_OPEN
    while (yield from source.skip(WHITESPACE)):
        header: list[str] = []
        known: list[str] = []
        found = yield from source.until(
            (arguments, call_id, opens), header.append, limit=MAX_NAME_LETTERS
        )
        if found == call_id:
            found = yield from source.until(
                (arguments, opens), known.append, limit=MAX_NAME_LETTERS
            )
        name = "".join(header).strip()
        begun = found == arguments and bool(_MISTRAL_NAME.fullmatch(name))
        given = "".join(known).strip()
        begun = begun and bool(not given or _MISTRAL_NAME.fullmatch(given))
        if not (begun and emitter.begin(name, given or None)):
            shown = _MISTRAL_ID + "".join(known) if known else ""
            context.text(before + "".join(header) + shown + context.shown(found))
            return
        yield from source.skip(WHITESPACE)
        if not (yield from read_value(source, emitter.arguments)):
            emitter.end_if_complete()
            return
        emitter.end()
        before = ""
        if (yield from source.peek()) == opens[0]:
            return


# --- Llama 4: a list of Python calls, in place of an answer ---

_NO_NAME = re.compile(r"[^\w.\s\[]")
_CALL_BEGIN = re.compile(r"\[\s*[\w.]+\s*")


def _pythonic_calls(context: CallContext, marker: str) -> Reading:
    parts: list[str] = []
    end = context.marker("<|python_end|>")
    letter = yield from context.source.scan(_NO_NAME, parts.append)
    begins = letter == "(" and _CALL_BEGIN.fullmatch("".join(parts).strip())
    if begins:
        found = yield from context.source.until((end,), parts.append)
        if "".join(parts).rstrip().endswith("]"):
            shown = context.shown
            emit_whole(context, "pythonic", "".join(parts), shown(marker), shown(found))
            return
    context.text(context.shown(marker) + "".join(parts))


# --- all forms ---

_K2 = HeaderFormat(
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    k2_header,
    numbered=True,
)
_DEEPSEEK = HeaderFormat(
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    deepseek_header,
    fenced=True,
)


def _header_format(name: str, section: str, form: HeaderFormat, *tokens: str) -> ToolFormat:
    marks = (section, form.call, form.arguments, form.call_end, form.section_end, *tokens)
    return ToolFormat(name, (section, form.call), marks, header_calls(form))


_QWEN_SECTION = ("<tool_call>", "</tool_call>")


def _typed_format(
    name: str, opens: str, *tokens: str, loose_opens: tuple[str, ...] = ()
) -> ToolFormat:
    return ToolFormat(name, (opens,), tokens, typed_calls(TYPED_FORMATS[name]), loose_opens)


def _pair_format(name: str, opens: str) -> ToolFormat:
    form = PAIR_FORMATS[name]
    tokens = (opens, form.section_end, *form.key, *form.value)
    return ToolFormat(name, (opens,), tokens, pair_calls(form))


def _whole_format(name: str, opens: str, close: str, *quotes: str) -> ToolFormat:
    tokens = (opens, close, *quotes)
    return ToolFormat(name, (opens,), tokens, whole_calls(name, close))


_FORMATS = (
    _header_format("kimi_k2", "<|tool_calls_section_begin|>", _K2),
    _header_format("deepseek_v3", "<｜tool▁calls▁begin｜>", _DEEPSEEK),
    _typed_format("kimi_k3", "<|open|>tools<|sep|>", *_XTML_TOKENS),
    _typed_format("deepseek_v32", f"<{DSML}function_calls>", DSML),
    _typed_format("deepseek_v4", f"<{DSML}tool_calls>", DSML),
    # Its calls are messages of their own, which ``harmony.read_messages`` reads.
    ToolFormat(harmony.NAME, (), harmony.TOKENS, hermes_calls("")),
    _pair_format("glm47", "<tool_call>"),
    _pair_format("laguna", "<tool_call>"),
    _pair_format("longcat", "<longcat_tool_call>"),
    ToolFormat("json_tools", _QWEN_SECTION[:1], _QWEN_SECTION, hermes_calls(_QWEN_SECTION[1])),
    # Models of this family forget the section's marker.
    _typed_format("qwen3_coder", *_QWEN_SECTION[:1], *_QWEN_SECTION, loose_opens=("<function=",)),
    _typed_format(
        "minimax_m2", "<minimax:tool_call>", "<minimax:tool_call>", "</minimax:tool_call>"
    ),
    _typed_format("minicpm5", "<function name="),
    _typed_format(
        "muse_spark", "<atem:function_calls>", "<atem:function_calls>", "</atem:function_calls>"
    ),
    ToolFormat(
        "mistral",
        (_MISTRAL_OPEN,),
        (_MISTRAL_OPEN, _MISTRAL_ARGUMENTS, _MISTRAL_ID),
        _mistral_calls,
        make_call_id=short_call_id,
    ),
    ToolFormat("llama3_json", ("<|python_tag|>",), ("<|python_tag|>",), hermes_calls(""), bare="{"),
    ToolFormat(
        "llama4_pythonic",
        ("<|python_start|>",),
        ("<|python_start|>", "<|python_end|>"),
        _pythonic_calls,
        bare="[",
    ),
    _whole_format("pythonic", "<|tool_call_start|>", "<|tool_call_end|>"),
    _whole_format("function_gemma", "<start_function_call>", "<end_function_call>", "<escape>"),
    _whole_format("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>'),
)
TOOL_FORMATS: dict[str, ToolFormat] = {form.name: form for form in _FORMATS}

TOOL_ALIASES = {
    "deepseek_v31": "deepseek_v3",
    "glm4": "glm47",
    "glm45": "glm47",
    "gpt_oss": "harmony",
    "hermes": "json_tools",
    "llama3": "llama3_json",
    "llama4": "llama4_pythonic",
    "minimax": "minimax_m2",
    "openai": "harmony",
    "qwen3": "json_tools",
    "qwen3_xml": "qwen3_coder",
}
REASONING_ALIASES = {
    "deepseek_r1": "think_open",
    "deepseek_v3": "think",
    "glm45": "think",
    "gpt_oss": "harmony",
    "kimi_k2": "think",
    "minimax_m2": "think",
    "openai": "harmony",
    "qwen3": "think",
    "seed_oss": "seed",
}
"""Names that vLLM and SGLang have for these forms."""
