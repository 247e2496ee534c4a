"""A vocabulary of bytes and markers, and whether a text obeys a grammar."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from k2cli.grammars.limits import parser_limits
from k2cli.grammars.text import GrammarText
from k2cli.server.structured.json_schema import checked_schema


class Vocabulary:
    """Byte tokens and markers that are tokens of their own; the first one ends answers."""

    def __init__(self, markers: Sequence[str] = ()) -> None:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        self._tokenizer = Tokenizer(
            models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens(["<eos>", *markers])
        rows = self._tokenizer.get_vocab_size()
        text = self._tokenizer.to_str()
        self._guided = LLTokenizer(text, n_vocab=rows, eos_token=[self.token_id("<eos>")])

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def accepts(self, grammar: str, text: str, prefix: str = "") -> bool:
        """Return True if the text after the prefix is a whole answer of the grammar."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._guided, grammar, log_level=0, limits=parser_limits())
        ids = self._tokenizer.encode(prefix + text, add_special_tokens=False).ids
        taken = matcher.try_consume_tokens(ids)
        assert not matcher.is_error() or taken < len(ids), matcher.get_error()
        return taken == len(ids) and matcher.is_accepting()


@functools.cache
def bytes_only() -> Vocabulary:
    return Vocabulary()


def schema_grammar(schema: Any, *, lenient: bool = False) -> str:
    """The grammar of a client's schema, after all checks."""
    text = GrammarText({})
    return text.build(text.json(checked_schema(schema, "schema", lenient=lenient)))


def holds(schema: Any, value: Any, *, lenient: bool = False) -> bool:
    """Return True if the grammar of a schema allows a value."""
    written = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return bytes_only().accepts(schema_grammar(schema, lenient=lenient), written)
