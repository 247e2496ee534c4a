"""Compare grammars with the JSON-Schema-Test-Suite: what a grammar accepts must be valid."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.schema_corpus.compiling import grammar_of
from benchmarks.schema_corpus.packages import Case
from k2cli.grammars.limits import parser_limits
from k2cli.server.errors import ApiError

_MOST_ORDERS = 500


@dataclass(slots=True)
class Compared:
    """Cases by what the grammar of their schema did.

    Attributes:
        refused: cases whose schema the server refuses.
        held: cases where grammar and suite agree.
        narrower: valid instances that the grammar rejects: an answer never has this form.
        wider: instances that are not valid and that the grammar accepts: a fault.
    """

    refused: list[Case] = field(default_factory=list)
    held: list[Case] = field(default_factory=list)
    narrower: list[Case] = field(default_factory=list)
    wider: list[Case] = field(default_factory=list)


def compare(cases: Sequence[Case]) -> Compared:
    """Compile the schema of each case, and match its instance in every order of its keys."""
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    compared = Compared()
    grammars: dict[str, str | None] = {}
    for case in cases:
        key = json.dumps(case.schema)
        if key not in grammars:
            try:
                grammars[key] = grammar_of(case.schema)
            except ApiError:
                grammars[key] = None
        grammar = grammars[key]
        if grammar is None:
            compared.refused.append(case)
            continue
        texts = itertools.islice(json_texts(case.instance), _MOST_ORDERS)
        accepted = any(accepts(tokenizer, grammar, text) for text in texts)
        if accepted == case.valid:
            compared.held.append(case)
        else:
            (compared.wider if accepted else compared.narrower).append(case)
    return compared


def accepts(tokenizer: Any, grammar: str, text: str) -> bool:
    """Return True if a grammar accepts a whole text."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    tokens = tokenizer.tokenize_bytes(text.encode(errors="surrogatepass"))
    taken = matcher.try_consume_tokens(tokens)
    return taken == len(tokens) and matcher.is_accepting() and not matcher.is_error()


def json_texts(value: Any) -> Iterator[str]:
    """Yield the JSON texts of a value, one for each order of keys."""
    if isinstance(value, dict):
        for names in itertools.permutations(value):
            parts = [
                [f"{_text(name)}: {text}" for text in json_texts(value[name])] for name in names
            ]
            for members in itertools.product(*parts):
                yield f"{{{', '.join(members)}}}"
    elif isinstance(value, list):
        for members in itertools.product(*(list(json_texts(each)) for each in value)):
            yield f"[{', '.join(members)}]"
    else:
        yield _text(value)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
