"""Limits of one grammar: time and memory of compiling it, and of each mask.

Whoever sends a request writes the grammar, so each of these is bounded. The counts are llguidance's
own: fuel is a step of its lexer (14,000 to 50,000 per ms), an item is one of its Earley parser, a
state of the lexer takes 1 to 2 kB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import llguidance

MAX_GRAMMAR_BYTES = 2**20
"""The text of a grammar, with all its schemas."""

MAX_LEXER_STATES = 50_000
INITIAL_LEXER_FUEL = 1_000_000
STEP_LEXER_FUEL = 200_000
STEP_MAX_ITEMS = 50_000
"""An ambiguous grammar takes 0.2 s for so many."""
MAX_ITEMS_IN_ROW = 4_000
"""Four for each optional property that may come next."""
MAX_GRAMMAR_SYMBOLS = 200_000


def parser_limits() -> llguidance.LLParserLimits:
    """Return the limits in llguidance's form."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=MAX_ITEMS_IN_ROW,
        initial_lexer_fuel=INITIAL_LEXER_FUEL,
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,
    )
