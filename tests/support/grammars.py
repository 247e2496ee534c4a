"""Grammars for tests, and the tokens that obey them, found with llguidance itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from k2cli.grammars.text import GrammarText
from k2cli.models.json_files import read_json_if_present
from k2cli.models.text.tokenizer_file import load_tokenizer
from k2cli.protocol import Grammar

# No whitespace between its parts, of which a toy may choose any amount.
LIST = r"""
start: "[" item ("," item){2} "]"
item: /"[a-z]{3,8}"/ | /[1-9][0-9]{0,3}/
"""

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "degrees": {"type": "integer", "minimum": -50, "maximum": 50},
        "sky": {"enum": ["clear", "cloudy"]},
    },
    "required": ["city", "degrees", "sky"],
    "additionalProperties": False,
}


def lark(text: str, prefix: str = "") -> Grammar:
    made = GrammarText({})
    return Grammar(made.build(made.lark(text)), prefix)


def json_schema(schema: dict[str, Any], prefix: str = "") -> Grammar:
    made = GrammarText({})
    return Grammar(made.build(made.json(schema)), prefix)


class Vocabulary:
    """The tokenizer of a checkpoint, and llguidance's view of it."""

    def __init__(self, folder: Path, rows: int, end: int) -> None:
        from llguidance import LLTokenizer

        self.tokenizer = load_tokenizer(
            folder, read_json_if_present(folder / "tokenizer_config.json")
        )
        self.guided = LLTokenizer(self.tokenizer.to_str(), n_vocab=rows, eos_token=[end])

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def matcher(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self.guided, grammar.text, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        if grammar.prefix:
            assert matcher.consume_tokens(self.encode(grammar.prefix))
        return matcher

    def completes(self, grammar: Grammar, tokens: Iterable[int]) -> bool:
        """True if tokens are a whole answer of the grammar."""
        matcher = self.matcher(grammar)
        return bool(matcher.consume_tokens(list(tokens)) and matcher.is_accepting())


def tokens_of(bits: bytes) -> set[int]:
    return {index for index in range(len(bits) * 8) if bits[index // 8] >> index % 8 & 1}


def is_weather(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"city", "degrees", "sky"}
        and -50 <= value["degrees"] <= 50
        and value["sky"] in ("clear", "cloudy")
    )
