"""The output format of the served model, which guard and reader processes find out alike."""

from __future__ import annotations

from k2cli.models.text.tokenizer import Tokenizer
from k2cli.server.output.output_format import OutputFormat, choose_output_format


def output_format_of(
    tokenizer: Tokenizer, tool_parser: str | None, reasoning_parser: str | None
) -> OutputFormat:
    """Choose the format by the chat template and vocabulary.

    Args:
        tokenizer: of the served model.
        tool_parser, reasoning_parser: names that override the choice.

    Raises:
        K2Error: if there is no format of that name.
    """
    sources = tokenizer.template_sources
    return choose_output_format(
        sources.with_tools or sources.plain,
        {"tool_parser_type": tokenizer.tool_parser_type},
        tokenizer.token_id,
        tool_parser,
        reasoning_parser,
    )
