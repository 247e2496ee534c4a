"""Check of a grammar before a rank gets it: does it compile within the limits?"""

from __future__ import annotations

from k2cli.grammars.limits import MAX_GRAMMAR_BYTES, parser_limits


def grammar_problem(grammar: str) -> str | None:
    """Return what is wrong with a grammar, or None.

    Args:
        grammar: the text that ``GrammarText.build`` returned. Ids of tokens are not checked, since
            no vocabulary is read for it.
    """
    from llguidance import LLMatcher

    if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
        return f"it has more than {MAX_GRAMMAR_BYTES} bytes"
    return LLMatcher.validate_grammar(grammar, limits=parser_limits()) or None
