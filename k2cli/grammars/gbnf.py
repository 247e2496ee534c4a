"""Translation of llama.cpp's grammars (GBNF) to Lark, by llguidance's own converter."""

from __future__ import annotations

MAX_GBNF_LETTERS = 32 * 1024
MAX_GBNF_RULES = 300
"""The converter takes time that is quadratic in rules (500: 0.2 s)."""


def lark_from_gbnf(grammar: str) -> str:
    """Translate a grammar.

    Args:
        grammar: in GBNF; its first rule to match is ``root``.

    Returns:
        the grammar in Lark; its first rule is ``start``.

    Raises:
        ValueError: with the reason, if it is too long or not in GBNF.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(grammar) > MAX_GBNF_LETTERS:
        raise ValueError(f"has {len(grammar)} letters, and the most are {MAX_GBNF_LETTERS}")
    rules = grammar.count("::=")
    if rules > MAX_GBNF_RULES:
        raise ValueError(f"has {rules} rules, and the most are {MAX_GBNF_RULES}")
    try:
        return gbnf_to_lark(grammar)
    except RecursionError as error:
        raise ValueError("nests too deeply") from error
    except Exception as error:  # it raises Exception itself, and IndexError at an early end
        raise ValueError(f"is not GBNF: {error}") from error
