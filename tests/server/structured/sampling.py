"""Random texts that a grammar allows, and what our parser reads in them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from k2cli.grammars.limits import parser_limits
from k2cli.grammars.text import GrammarText
from k2cli.server.client_request import OutputOptions
from k2cli.server.output.events import Blocks
from k2cli.server.output.known_formats import TOOL_FORMATS
from k2cli.server.output.output_format import OutputFormat, choose_output_format
from k2cli.server.structured.calls import Function, call_grammar, calls_after_text
from k2cli.server.text_assembler import Marker, Piece
from tests.server.output.parsing import check_order, run

FORMS = [*TOOL_FORMATS]
_BYTES = 256
_END = "<end of answer>"


@dataclass(frozen=True)
class Model:
    """A model of one family, whose vocabulary has bytes and markers.

    ``markers`` are the ids of the markers that are tokens.
    """

    form: OutputFormat
    tokenizer: LLTokenizer
    end: int
    markers: dict[str, int]
    letters: dict[int, int]

    def text(self) -> GrammarText:
        return GrammarText(self.form.token_ids)

    def matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=parser_limits())
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def ids(self, text: str) -> list[int]:
        """Encode a text in which markers are their tokens."""
        ids: list[int] = []
        while text:
            marker = next((m for m in self.markers if text.startswith(m)), None)
            ids += [self.markers[marker]] if marker else self.letter_ids(text[0])
            text = text[len(marker or " ") :]
        return ids

    def letter_ids(self, text: str) -> list[int]:
        """Encode a text in which markers are letters."""
        return [self.letters[byte] for byte in text.encode()]

    def pieces(self, ids: Sequence[int], cuts: Iterable[int]) -> list[Piece]:
        """Return the answer of these tokens in pieces, cut between letters."""
        names = {number: text for text, number in self.markers.items()}
        bytes_of = {number: byte for byte, number in self.letters.items()}
        units: list[tuple[str, bool]] = []
        held = bytearray()
        for number in [*ids, self.end]:
            if number in bytes_of:
                held.append(bytes_of[number])
                continue
            units += [(letter, False) for letter in held.decode()]
            held.clear()
            if number != self.end:
                units.append((names[number], True))
        bounds = sorted({0, len(units), *(cut % (len(units) + 1) for cut in cuts)})
        pieces = []
        for begin, end in itertools.pairwise(bounds):
            text, marks = "", []
            for unit, is_marker in units[begin:end]:
                marks += [Marker(len(text), unit)] if is_marker else []
                text += unit
            pieces.append(Piece(text, markers=marks))
        return pieces


@cache
def model(parser: str, plain: bool = False, without: tuple[str, ...] = ()) -> Model:
    """Make a model of a family.

    Args:
        plain: True if its markers are no tokens but ordinary letters.
        without: markers that are none.
    """
    bytes_to_letters = _byte_letters()
    alphabet = sorted(bytes_to_letters.values())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    markers = [] if plain else [m for m in TOOL_FORMATS[parser].tokens if m not in without]
    tokenizer.add_special_tokens([_END, *dict.fromkeys(markers)])
    found = {text: tokenizer.token_to_id(text) for text in dict.fromkeys(markers)}
    end = tokenizer.token_to_id(_END)
    form = choose_output_format("", {}, found.get, parser, "none")
    numbers = {byte: vocabulary[letter] for byte, letter in bytes_to_letters.items()}
    made = LLTokenizer(tokenizer.to_str(), n_vocab=len(vocabulary) + len(found) + 1, eos_token=end)
    return Model(form, made, end, found, numbers)


def _byte_letters() -> dict[int, str]:
    """Return the letters that byte-level tokenizers have for bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(_BYTES) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(_BYTES + number) for number, byte in enumerate(hidden)
    }


def allowed(matcher: LLMatcher) -> list[int]:
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return [int(number) for number in np.flatnonzero(np.unpackbits(mask, bitorder="little"))]


def sample(
    of: Model, matcher: LLMatcher, source: random.Random, snippets: Sequence[str], length: int
) -> list[int] | None:
    """Choose a text of the grammar; None if it did not end.

    Args:
        snippets: texts to try at random places.
        length: tokens after which the text is to end.
    """
    ids: list[int] = []
    closers = [[number] for number in of.markers.values()]
    closers += [of.letter_ids(text) for text in ('"', "}", "]", "'", ")", "0", ">")]
    closers += [of.letter_ids(text) for text in snippets if text.lstrip().startswith("</")]
    while len(ids) < 20 * length:
        ending = len(ids) >= length
        if matcher.is_stopped():
            return ids
        if matcher.is_accepting() and (ending or source.random() < 0.1):
            return ids
        tried = source.sample(closers, k=len(closers)) if ending else []
        if not ending and source.random() < 0.4:
            tried = [of.letter_ids(source.choice(snippets))]
        for some in tried:
            if matcher.validate_tokens(some) == len(some):
                break
        else:
            choices = [number for number in allowed(matcher) if number != of.end]
            some = [source.choice(choices)]
        assert matcher.consume_tokens(some), matcher.get_error()
        ids += some
    return None


def read(of: Model, ids: Sequence[int], functions: Sequence[Function], cuts: Iterable[int]) -> Any:
    """Return the parts of an answer."""
    tools = [
        {"type": "function", "function": {"name": each.name, "parameters": each.parameters}}
        for each in functions
    ]
    parser = of.form.parser(OutputOptions(True, tools))
    events = run(parser, of.pieces(ids, cuts))
    check_order(events)
    blocks = Blocks()
    blocks.add(events)
    return blocks


def grammar(of: Model, functions: Sequence[Function], several: bool, after_text: bool) -> str:
    assert of.form.tools is not None
    text = of.text()
    make = calls_after_text if after_text else call_grammar
    return text.build(make(of.form.tools, functions, text, several=several))
