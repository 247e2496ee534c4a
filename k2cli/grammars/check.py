"""Check of a grammar before a rank gets it: does it compile within the limits?"""

from __future__ import annotations

import hashlib

from k2cli.bounded_cache import BoundedCache
from k2cli.grammars.limits import MAX_GRAMMAR_BYTES, parser_limits

_CACHED_BYTES = 4 * 2**20
_ENTRY_BYTES = 250
"""An answer without its text: the key, and Python's objects."""

_known: BoundedCache[str] = BoundedCache(_CACHED_BYTES)


def grammar_problem(grammar: str) -> str | None:
    """Return what is wrong with a grammar, or None.

    Agents send the same formats and tools with each request, so answers are kept for a while.

    Args:
        grammar: the text that ``GrammarText.build`` returned. Ids of tokens are not checked, since
            no vocabulary is read for it.
    """
    text = grammar.encode(errors="replace")
    if len(text) > MAX_GRAMMAR_BYTES:
        return f"it has more than {MAX_GRAMMAR_BYTES} bytes"
    key = hashlib.sha256(text).digest()
    problem = _known.get(key)
    if problem is None:
        from llguidance import LLMatcher

        problem = LLMatcher.validate_grammar(grammar, limits=parser_limits())
        _known.put(key, problem, len(problem) + _ENTRY_BYTES)
    return problem or None
