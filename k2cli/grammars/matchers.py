"""Grammars as they are matched token by token: the tokenizer, compiled grammars, and masks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from k2cli.errors import K2Error
from k2cli.grammars.limits import parser_limits
from k2cli.models.json_files import read_json_if_present
from k2cli.models.text.tokenizer_file import load_tokenizer

if TYPE_CHECKING:
    import llguidance

KEPT_GRAMMARS = 64
KEPT_BYTES = 4 * 2**20
"""Compiled grammars that are kept for later requests, and their texts together."""

_MAX_ERROR_LETTERS = 400
_DEAD_END = "NoExtensionBias"
"""llguidance's name for a place from which no text goes on, as in ``[^\\s\\S]``."""
_NO_TEXT = "no token of the model's vocabulary can continue the answer"


class GrammarError(K2Error):
    """A grammar, or the beginning of an answer, that cannot be obeyed."""


class Matcher:
    """The state of one answer. ``stop_tokens`` are its request's."""

    def __init__(
        self, matcher: llguidance.LLMatcher, end_tokens: frozenset[int], stop_tokens: frozenset[int]
    ) -> None:
        self._matcher = matcher
        self._wrong_ends = end_tokens - stop_tokens
        self._missing_ends = stop_tokens - end_tokens
        self._ends = stop_tokens | end_tokens

    def take(self, tokens: Sequence[int]) -> None:
        """Add tokens to the answer.

        Raises:
            GrammarError: if they do not obey the grammar.
        """
        self._matcher.consume_tokens(list(tokens))
        self._check()

    def mask(self) -> bytes | None:
        """Return the tokens that may come next, in the form of ``Mask``; None if nothing may.

        Raises:
            GrammarError: if no token may come, although the answer is not complete.
        """
        matcher = self._matcher
        if matcher.is_stopped():
            self._check()
            return None
        bits = matcher.compute_bitmask()
        self._check()
        accepting = matcher.is_accepting()
        if accepting and not _any(_with(bits, self._ends, present=False)):
            return None
        if not accepting and not _any(bits):
            raise GrammarError(_NO_TEXT)
        if accepting and (self._wrong_ends or self._missing_ends):
            bits = _with(bits, self._wrong_ends, present=False)
            bits = _with(bits, self._missing_ends, present=True)
        return bits

    def _check(self) -> None:
        if self._matcher.is_error():
            error = self._matcher.get_error()
            raise GrammarError(_NO_TEXT if error.startswith(_DEAD_END) else _shortened(error))


class Compiler:
    """The tokenizer of a model, and the grammars that were compiled for it.

    Args:
        folder: the checkpoint.
        rows: the least number of tokens that masks have.
        stop_tokens: of the first request; another request may have others.

    Raises:
        K2Error: if the tokenizer cannot be read.
        GrammarError: if llguidance cannot use it.
    """

    def __init__(self, folder: Path, rows: int, stop_tokens: Sequence[int]) -> None:
        from llguidance import LLTokenizer

        tokenizer = load_tokenizer(folder, read_json_if_present(folder / "tokenizer_config.json"))
        size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        # llguidance wants an end token, also of a model that has none; masks never have this one.
        ends = [token for token in stop_tokens if token < size] or [size - 1]
        text = tokenizer.to_str()
        del tokenizer
        try:
            self._tokenizer = LLTokenizer(text, n_vocab=max(rows, size), eos_token=ends)
        except ValueError as error:
            reason = _shortened(str(error))
            raise GrammarError(f"the model's tokenizer cannot be used with it: {reason}") from error
        self._rows = max(rows, size)
        self._ends = frozenset(ends)
        self._limits = parser_limits()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def open(self, grammar: str, prefix: str, stop_tokens: Sequence[int]) -> Matcher:
        """Return the state of an answer that begins with ``prefix``.

        Raises:
            GrammarError: if the grammar cannot be used, or ``prefix`` does not obey it.
        """
        stops = frozenset(token for token in stop_tokens if 0 <= token < self._rows)
        matcher = Matcher(self._compile(grammar).deep_copy(), self._ends, stops)
        if prefix:
            try:
                matcher.take(self._tokenizer.tokenize_str(prefix))
            except GrammarError as error:
                raise GrammarError(
                    f"the beginning of the answer, which the request gives, does not obey the "
                    f"grammar: {error.message}"
                ) from error
        return matcher

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        from llguidance import LLMatcher

        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(_shortened(matcher.get_error()))
        self._compiled[grammar] = matcher
        while len(self._compiled) > 1 and (
            len(self._compiled) > KEPT_GRAMMARS or sum(map(len, self._compiled)) > KEPT_BYTES
        ):
            self._compiled.popitem(last=False)
        return matcher


def _any(bits: bytes) -> bool:
    return bits.count(0) < len(bits)


def _with(bits: bytes, tokens: frozenset[int], *, present: bool) -> bytes:
    if not tokens:
        return bits
    changed = bytearray(bits)
    for token in tokens:
        if token // 8 < len(changed):
            if present:
                changed[token // 8] |= 1 << token % 8
            else:
                changed[token // 8] &= ~(1 << token % 8)
    return bytes(changed)


def _shortened(error: str) -> str:
    """Return the part of an error of llguidance that is for users, without the parser's state."""
    return error.split("\n<state>", 1)[0].strip()[:_MAX_ERROR_LETTERS]
