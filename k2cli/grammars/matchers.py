"""Grammars as they are matched token by token: the tokenizer, compiled grammars, and masks."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

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
_LEXER_ERROR = "lexer error"
_RENEWALS = 2  # the first may give one that another answer has filled, too
_Result = TypeVar("_Result")
_DEAD_END = "NoExtensionBias"
"""llguidance's name for a place from which no text goes on, as in ``[^\\s\\S]``."""
_NO_TEXT = "no token of the model's vocabulary can continue the answer"


class GrammarError(K2Error):
    """A grammar, or the beginning of an answer, that cannot be obeyed."""


class Matcher:
    """The state of one answer.

    All answers of a grammar share llguidance's lexer, which learns states as answers need them. When
    it is full, or one answer has exceeded the limit of a step, it refuses all of them from then on;
    so an answer then goes on with a lexer that is new.

    Args:
        compiled: gives the compiled grammar; if a lexer is full, another one than it gave before.
        end_tokens: those that llguidance was told.
        stop_tokens: the request's.
    """

    def __init__(
        self,
        compiled: Callable[[llguidance.LLMatcher | None], llguidance.LLMatcher],
        end_tokens: frozenset[int],
        stop_tokens: frozenset[int],
    ) -> None:
        self._compiled = compiled
        self._origin = compiled(None)
        self._matcher = self._origin.deep_copy()
        self._taken: list[int] = []
        self._stops = stop_tokens
        self._wrong_ends = end_tokens - stop_tokens
        self._missing_ends = stop_tokens - end_tokens
        self._ends = stop_tokens | end_tokens

    def take(self, tokens: Sequence[int]) -> None:
        """Add tokens to the answer.

        Raises:
            GrammarError: if they do not obey the grammar.
        """
        self._attempt(lambda: self._matcher.consume_tokens(list(tokens)))
        self._taken += tokens

    def mask(self) -> bytes | None:
        """Return the tokens that may come next, in the form of ``Mask``; None if nothing may.

        Raises:
            GrammarError: if no token may come, although the answer is not complete.
        """
        bits = self._attempt(self._next_bits)
        if bits is None:
            return None
        accepting = self._matcher.is_accepting()
        if accepting and not _any(_with(bits, self._ends, present=False)):
            return None
        if not accepting:
            # A stop token may be one of text, with which an incomplete answer would end.
            bits = _with(bits, self._stops, present=False)
            if not _any(bits):
                raise GrammarError(_NO_TEXT)
        elif self._wrong_ends or self._missing_ends:
            bits = _with(bits, self._wrong_ends, present=False)
            bits = _with(bits, self._missing_ends, present=True)
        return bits

    def _next_bits(self) -> bytes | None:
        return None if self._matcher.is_stopped() else self._matcher.compute_bitmask()

    def _attempt(self, do: Callable[[], _Result]) -> _Result:
        """Do something with the matcher, with a new lexer if this one is full.

        Raises:
            GrammarError: if that fails.
        """
        result = do()
        for _ in range(_RENEWALS):
            if not self._is_full:
                break
            self._origin = self._compiled(self._origin)
            self._matcher = self._origin.deep_copy()
            if self._matcher.consume_tokens(self._taken):
                result = do()
        if self._is_full:
            self._compiled(self._origin)  # so that no other answer gets this one
        if self._matcher.is_error():
            error = self._matcher.get_error()
            raise GrammarError(_NO_TEXT if error.startswith(_DEAD_END) else _shortened(error))
        return result

    @property
    def _is_full(self) -> bool:
        return self._matcher.is_error() and _LEXER_ERROR in self._matcher.get_error()


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
        self._lock = threading.Lock()

    def open(self, grammar: str, prefix: str, stop_tokens: Sequence[int]) -> Matcher:
        """Return the state of an answer that begins with ``prefix``.

        Raises:
            GrammarError: if the grammar cannot be used, or ``prefix`` does not obey it.
        """
        stops = frozenset(token for token in stop_tokens if 0 <= token < self._rows)
        matcher = Matcher(partial(self._compile, grammar), self._ends, stops)
        if prefix:
            try:
                matcher.take(self._tokenizer.tokenize_str(prefix))
            except GrammarError as error:
                raise GrammarError(
                    f"the beginning of the answer, which the request gives, does not obey the "
                    f"grammar: {error.message}"
                ) from error
        return matcher

    def forget(self) -> None:
        """Forget the compiled grammars that no answer uses."""
        with self._lock:
            self._compiled.clear()

    def _compile(
        self, grammar: str, spoiled: llguidance.LLMatcher | None = None
    ) -> llguidance.LLMatcher:
        """Return a compiled grammar, but not ``spoiled``."""
        from llguidance import LLMatcher

        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None and found is not spoiled:
                self._compiled.move_to_end(grammar)
                return found
            self._compiled.pop(grammar, None)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(_shortened(matcher.get_error()))
        with self._lock:
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
    """Return the part of an error of llguidance that is for users, in words for them."""
    text = _PARSER_STATE.split(error, maxsplit=1)[0].strip()
    for pattern, words in _WORDS:
        if found := pattern.search(text):
            return found.expand(words)
    return text[:_MAX_ERROR_LETTERS]


_PARSER_STATE = re.compile("\n<(?:state|non-verbose)")
_WORDS = (
    (
        re.compile(r"Current row has (\d+) items; max is (\d+)"),
        r"it allows \1 ways to go on at one place, such as optional properties; the most are \2",
    ),
    (
        re.compile("too many expressions constructed|fuel exhausted|too many states"),
        "a pattern, a range of numbers or 'multipleOf' in it is too large to be followed",
    ),
)
