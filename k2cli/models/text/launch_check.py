"""The check of a checkpoint's tokenizer and chat templates at the launch of a server.

Their author decides how long they run. So they are tried once, in a process that can be killed,
before the model serves anybody: a template on small conversations, and the tokenizer on texts for
which a careless or hostile regular expression takes a time that is exponential, or a high power, in
the length of the text. The process announces each step, so that whoever kills it can name the file.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error
from k2cli.models.text.chat_template import ChatTemplate, Oversized, TemplateSources
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.models.text.tokenizer_file import is_panic, tokenizer_file

Announce = Callable[[str, str], None]
"""Callback that takes the file that is about to be tried, and how: ``reading``, ``rendering``."""

MAX_LETTERS = 2**20
"""The longest prompt that a template may make of the small conversations here."""

_SHORT_RUN, _LONG_RUN = 64, 4096
_MAX_LITERALS = 32
_LONG_RUN_LETTERS = "aA1 \n\t.-_/中é"
_PROSE = (
    "It's a long text, isn't it?  We'll split it into words; they're 1,234,567 or 3.14 in all.\n\n"
    "def f(x):\n    return {'a': x ** 2}  # -> https://example.org/?q=1&r=%20\n"
    "\tGrüße aus Köln, naïve café. 你好，世界！ Привет, мир. नमस्ते 🙂👍🏽 \r\n"
)
_PROSE_COPIES = 64
# It belongs to no word, number or space, so that a match that wants more of the run fails.
_END = "~\x01\n"

_TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]
_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]


def load_checked(folder: Path, announce: Announce) -> Tokenizer:
    """Load the tokenizer and chat templates of a checkpoint and try them.

    Raises:
        K2Error: if a file cannot be used; the message names it.
    """
    path = str(tokenizer_file(folder))
    announce(path, "reading")
    tokenizer = Tokenizer.load(folder)
    announce(path, "encoding a long text with")
    _try_tokenizer(path, tokenizer)
    sources = tokenizer.template_sources
    for file, tools in ((sources.path, None), (sources.tools_path, _TOOLS)):
        announce(file, "compiling the chat template in")
        template = _compiled(tokenizer, file, with_tools=tools is not None)
        if template is not None:
            announce(file, "rendering a short conversation with the template in")
            _try_template(template, file, tools)
    return tokenizer


def load_known(folder: Path, templates: TemplateSources, announce: Announce) -> Tokenizer:
    """Load the tokenizer again, with templates that ``load_checked`` has tried.

    Raises:
        K2Error: if a file cannot be read any more.
    """
    announce(str(tokenizer_file(folder)), "reading")
    tokenizer = Tokenizer.load(folder, templates)
    announce(templates.path, "compiling the chat template in")
    for with_tools in (False, True):
        tokenizer.template(with_tools=with_tools)
    return tokenizer


def probing_text(literals: str) -> str:
    """Make the text that the tokenizer is tried on: runs of each character, and prose.

    Args:
        literals: characters of the tokenizer's own regular expressions, for which there are long
            runs, too.
    """
    long_runs = dict.fromkeys(_LONG_RUN_LETTERS + literals[:_MAX_LITERALS])
    short_runs = [letter * _SHORT_RUN + _END for letter in string.printable]
    runs = [letter * _LONG_RUN + _END for letter in long_runs]
    return "".join([*short_runs, _PROSE * _PROSE_COPIES, _END, *runs])


def _try_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    try:
        tokenizer.encode(probing_text(tokenizer.pattern_letters))
    except K2Error as error:
        if is_panic(error.__cause__):
            raise K2Error(f"{path} cannot be used: {error.message}", error.hint) from error
        # Otherwise the vocabulary lacks a character.


def _compiled(tokenizer: Tokenizer, path: str, *, with_tools: bool) -> ChatTemplate | None:
    try:
        return tokenizer.template(with_tools=with_tools)
    except K2Error as error:
        raise K2Error(f"{path}: {error.message}", error.hint) from error


def _try_template(template: ChatTemplate, path: str, tools: list[dict[str, Any]] | None) -> None:
    """Render two conversations. A template may refuse them: some know no system message."""
    for turns in (_TURNS, _TURNS[1:2]):
        try:
            template.render(turns, tools, True, {}, MAX_LETTERS)
        except K2Error as error:
            if isinstance(error.__cause__, Oversized):
                raise K2Error(f"{path}: {error.message}") from error
