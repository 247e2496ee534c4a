"""Choice of the format of a model's output, and the parser of one answer.

Everything here is pure: the texts of the template and of the config, and the ids of tokens, are
given by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from k2cli.errors import K2Error
from k2cli.server.client_request import OutputOptions
from k2cli.server.output.events import OutputParser, PlainOutput
from k2cli.server.output.known_formats import (
    REASONING_ALIASES,
    REASONING_FORMATS,
    TOOL_ALIASES,
    TOOL_FORMATS,
)
from k2cli.server.output.parser import MarkedOutput, ReasoningFormat
from k2cli.server.output.source import MarkerCodes
from k2cli.server.output.tool_format import ToolFormat

TokenId = Callable[[str], int | None]
NONE = "none"
_Format = TypeVar("_Format")


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """Marks of the parts of a model's answers.

    Attributes:
        reasoning: the markers of reasoning, or None.
        tools: the format of calls, or None.
        trims_newlines: True if newlines beside markers belong to the markers.
        token_ids: the ids of markers that are special tokens of the model.
    """

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    trims_newlines: bool = True
    token_ids: Mapping[str, int] = field(default_factory=dict)

    def begins_in_reasoning(self, prompt: str, continued: str | None = None) -> bool:
        """Return True if the answer to a prompt begins within reasoning.

        Args:
            prompt: the rendered prompt.
            continued: the beginning of the answer, if the prompt ends with it.
        """
        form = self.reasoning
        if form is None:
            return False
        if continued is not None:
            return continued.rfind(form.opens) > continued.rfind(form.close)
        end = prompt.rstrip()
        if end.endswith(form.opens):
            return True
        return form.begins_inside and not end.endswith(form.close)

    def _active(self, options: OutputOptions) -> tuple[ReasoningFormat | None, ToolFormat | None]:
        if not options.parsed:
            return None, None
        tools = self.tools if options.tools else None
        if tools is not None and options.obeys_format:
            tools = replace(tools, loose_opens=(), bare="")
        return self.reasoning, tools

    def marker_tokens(self, options: OutputOptions) -> dict[int, str]:
        """Return the special tokens that a request's parser has to see, with their texts."""
        reasoning, tools = self._active(options)
        texts = (*(reasoning.tokens if reasoning else ()), *(tools.tokens if tools else ()))
        return {self.token_ids[text]: text for text in texts if text in self.token_ids}

    def parser(self, options: OutputOptions) -> OutputParser:
        """Make the parser of one answer."""
        reasoning, tools = self._active(options)
        if reasoning is None and tools is None:
            return PlainOutput()
        return MarkedOutput(
            MarkerCodes(self.marker_tokens(options).values()),
            reasoning,
            tools,
            options.tools or [],
            begins_in_reasoning=options.begins_in_reasoning,
            trims_newlines=self.trims_newlines,
            only_first_call=not options.parallel_calls,
        )


def choose_output_format(
    template_source: str | None,
    config: Mapping[str, Any],
    token_id: TokenId,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> OutputFormat:
    """Choose the format of a model's output.

    Args:
        template_source: the text of the chat template, if there is one.
        config: the model's ``config.json``, or the tokenizer's with ``tool_parser_type``.
        token_id: returns the id of a token with a text, if there is one.
        tool_parser, reasoning_parser: names that override the choice; ``none`` for none.

    Raises:
        K2Error: if there is no format of that name.
    """
    template = template_source or ""
    if tool_parser is None:
        tools = _tools_of_model(template, config, token_id)
    else:
        tools = _named(tool_parser, TOOL_FORMATS, TOOL_ALIASES, "--tool-parser", "tool parser")
    if reasoning_parser is None:
        reasoning = _reasoning_of_model(template, token_id)
    else:
        reasoning = _named(
            reasoning_parser,
            REASONING_FORMATS,
            REASONING_ALIASES,
            "--reasoning-parser",
            "reasoning parser",
        )
    texts = (*(reasoning.tokens if reasoning else ()), *(tools.tokens if tools else ()))
    found = {text: number for text in texts if (number := token_id(text)) is not None}
    return OutputFormat(reasoning, tools, not _keeps_newlines(tools, template), found)


def _named(
    name: str, forms: Mapping[str, _Format], aliases: Mapping[str, str], option: str, what: str
) -> _Format | None:
    if name == NONE:
        return None
    found = forms.get(aliases.get(name, name))
    if found is None:
        known = ", ".join((NONE, *sorted(forms)))
        raise K2Error(f"there is no {what} named '{name}'", f"{option} takes one of: {known}")
    return found


def _keeps_newlines(tools: ToolFormat | None, template: str) -> bool:
    """Return True for models whose templates repeat the text beside markers unchanged."""
    verbatim = tools is not None and tools.name in ("kimi_k2", "kimi_k3", "harmony")
    return verbatim or "<|im_middle|>" in template


# The first entry whose texts are all in a template names the format.
_IN_TEMPLATE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("deepseek_v4", ("<｜DSML｜tool_calls",)),
    ("deepseek_v32", ("<｜DSML｜",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>",)),
    ("harmony", ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("json_tools", ("<tool_call>",)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("llama4_pythonic", ("<|header_start|>", "func_name1(")),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters"')),
)


def _tools_of_model(
    template: str, config: Mapping[str, Any], token_id: TokenId
) -> ToolFormat | None:
    named = config.get("tool_parser_type")
    if isinstance(named, str) and named in TOOL_FORMATS:
        return TOOL_FORMATS[named]
    for name, texts in _IN_TEMPLATE:
        if all(text in template for text in texts):
            return TOOL_FORMATS[name]
    if _has_all(token_id, REASONING_FORMATS["kimi_k3"].tokens):
        return TOOL_FORMATS["kimi_k3"]
    # Some models have no template, and some conversions do not name the tokens in it.
    for name in ("kimi_k2", "deepseek_v3", "pythonic"):
        if _has_all(token_id, TOOL_FORMATS[name].tokens):
            return TOOL_FORMATS[name]
    return None


def _has_all(token_id: TokenId, texts: tuple[str, ...]) -> bool:
    return all(token_id(text) is not None for text in texts)


def _reasoning_of_model(template: str, token_id: TokenId) -> ReasoningFormat | None:
    for form in REASONING_FORMATS.values():
        if not form.begins_inside and _has_all(token_id, form.tokens):
            return form
    for form in REASONING_FORMATS.values():
        if form.opens in template and form.close in template:
            return form
    return None
