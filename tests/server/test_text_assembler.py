from __future__ import annotations

import random

import pytest

from k2cli.protocol import TokenLogprob
from k2cli.server.text_assembler import TextAssembler, held_back
from tests.server.scripted import LetterStream, LetterTokenizer


def assembled(text: str, stops: list[str], sizes: list[int]) -> tuple[str, TextAssembler]:
    """Push ``text`` in groups of tokens; check on the way that nothing is ever taken back."""
    assembler = TextAssembler(LetterStream(), stops)
    tokens = LetterTokenizer().encode(text)
    out, position = "", 0
    while position < len(tokens):
        size = sizes[position % len(sizes)]
        out += assembler.push(tokens[position : position + size]).text
        position += size
    return out + assembler.finish().text, assembler


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("Hello world", [], "Hello world"),
        ("Hello world", ["lo w"], "Hel"),
        ("Hello", ["Hello"], ""),
        ("aaab", ["aab"], "a"),
        ("one STOP two", ["two", "STOP"], "one "),
        ("ends with ST", ["STOP"], "ends with ST"),
        ("😀 ok 😀 end", ["ok 😀"], "😀 "),
        ("巴黎。是的", ["。是"], "巴黎"),
    ],
)
def test_stop_strings_at_any_token_boundary(text: str, stops: list[str], shown: str) -> None:
    for sizes in ([1], [2], [3], [100]):
        out, assembler = assembled(text, stops, sizes)
        assert out == shown
        assert assembler.stopped == (shown != text)


def test_random_texts_agree_with_a_search_of_the_whole_text() -> None:
    source = random.Random(7)
    for _ in range(500):
        text = "".join(source.choice("ab😀") for _ in range(source.randrange(0, 30)))
        stops = ["".join(source.choice("ab😀") for _ in range(source.randrange(1, 5)))]
        sizes = [source.randrange(1, 4) for _ in range(5)]
        assert assembled(text, stops, sizes)[0] == text.split(stops[0])[0]


def test_what_may_become_a_stop_string_is_held_back_and_no_more() -> None:
    assert held_back("abc", ["cde"]) == 1
    assert held_back("abcd", ["cde", "bcdx"]) == 3
    assert held_back("abc", ["x"]) == 0
    # A complete stop string is a match, not a beginning.
    assert held_back("abab", ["ab"]) == 0


def test_scores_travel_with_their_text_and_end_at_the_stop() -> None:
    assembler = TextAssembler(LetterStream(), ["cd"])
    tokens = LetterTokenizer().encode("abcdef")
    scores = [TokenLogprob(-float(index)) for index in range(len(tokens))]
    first = assembler.push(tokens[:3], scores[:3])
    assert (first.text, [s.token for s in first.scores]) == ("ab", tokens[:2])
    second = assembler.push(tokens[3:], scores[3:])
    assert (second.text, second.scores) == ("", [])
    assert assembler.stopped
    assert assembler.tokens_used == 4
    rest = assembler.finish()
    assert (rest.text, list(rest.scores)) == ("", [])


MARKERS = {ord("["): "<a>", ord("]"): "</a>"}


def marked(text: str, stops: list[str], size: int) -> tuple[str, list[tuple[int, str]], list[int]]:
    """Push a text whose brackets are markers; return text, markers and offsets of tokens."""
    assembler = TextAssembler(HiddenBrackets(), stops, MARKERS)
    tokens = LetterTokenizer().encode(text)
    pieces = [assembler.push(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    pieces.append(assembler.finish())
    out, markers, offsets = "", [], []
    for piece in pieces:
        markers += [(len(out) + marker.offset, marker.text) for marker in piece.markers]
        offsets += piece.token_offsets
        out += piece.text
    assert all(out.startswith(marker, at) for at, marker in markers)
    return out, markers, offsets


class HiddenBrackets(LetterStream):
    """Stream that leaves out special tokens."""

    def push(self, token_id: int, /) -> str:
        return "" if token_id in MARKERS else super().push(token_id)


def test_markers_are_tokens_and_not_their_text() -> None:
    for size in (1, 2, 100):
        out, markers, offsets = marked("x<a>[y]", [], size)
        assert out == "x<a><a>y</a>"
        assert markers == [(4, "<a>"), (8, "</a>")]
        assert offsets == [0, 1, 2, 3, 4, 7, 8]


def test_stop_strings_do_not_cut_markers() -> None:
    for size in (1, 2, 100):
        assert marked("x[y]z", ["a>y"], size)[:2] == ("x", [])
        assert marked("x[y]z", ["</a>"], size)[:2] == ("x<a>y", [(1, "<a>")])
        assert marked("x[y]z", ["a>q"], size)[0] == "x<a>y</a>z"
