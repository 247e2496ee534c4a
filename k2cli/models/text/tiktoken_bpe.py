"""K2's vocabulary file (tiktoken's format) as a ``tokenizers`` byte-level BPE.

K2 ships its tokenizer as ranks in ``tiktoken.model`` and a Python file that would have to be run.
The ranks are data; the two things that the Python file adds, the pattern that cuts text into words
and the 256 reserved special tokens, are restated here, and nothing from the repository is run.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error

if TYPE_CHECKING:
    import tokenizers

_MAX_FILE_BYTES = 200_000_000
_MAX_TOKEN_BYTES = 4096
RESERVED_SPECIAL_TOKENS = 256
"""Special tokens after the ranks; the unnamed ones are called ``<|reserved_token_ID|>``."""

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
K2_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How K2 cuts text into words: Chinese apart, then words by case, numbers by three digits."""


def find_vocabulary(folder: Path) -> Path | None:
    """The folder's vocabulary in tiktoken's format, if it has one."""
    named = folder / "tiktoken.model"
    return named if named.is_file() else next(iter(sorted(folder.glob("*.tiktoken"))), None)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank, from lines of ``base64 rank``.

    Raises:
        K2Error: if a line is malformed, a rank or token occurs twice, or a byte has no token.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise K2Error(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        token, rank = _parse_line(path, number, line)
        if token in ranks:
            raise K2Error(f"{path}, line {number}: the token occurs twice")
        ranks[token] = rank
    if set(ranks.values()) != set(range(len(ranks))):
        raise K2Error(f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once")
    if any(bytes([value]) not in ranks for value in range(256)):
        raise K2Error(f"{path}: a byte has no token of its own", "download it again")
    return ranks


def _parse_line(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    try:
        text, rank = line.split()
        token = base64.b64decode(text, validate=True)
        if not 0 < len(token) <= _MAX_TOKEN_BYTES:
            raise ValueError("a token of no or too many bytes")
        return token, int(rank)
    except (ValueError, binascii.Error) as error:
        raise K2Error(f"{path}, line {number} is not 'base64 rank': {error}") from error


def special_tokens(path: Path, first: int, named: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens with the ids from ``first`` on, in ``tokenizer.json``'s form.

    Args:
        path: the vocabulary, for messages.
        first: the number of ranks.
        named: ``added_tokens_decoder`` of ``tokenizer_config.json``: id as text to fields.

    Raises:
        K2Error: if a named token lies outside the reserved ids, or has no text.
    """
    past_last = first + RESERVED_SPECIAL_TOKENS
    contents: dict[int, dict[str, Any]] = {}
    for key, fields in named.items():
        content = fields.get("content") if isinstance(fields, dict) else None
        if not key.isdecimal() or not first <= int(key) < past_last or not content:
            raise K2Error(
                f"{path.parent / 'tokenizer_config.json'}: the special token {key!r} must have "
                f"text and an id from {first} to {past_last - 1}"
            )
        contents[int(key)] = fields
    default = {"special": True}
    return [
        {
            "id": number,
            "content": contents.get(number, {}).get("content", f"<|reserved_token_{number}|>"),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(contents.get(number, default).get("special", False)),
        }
        for number in range(first, past_last)
    ]


def build_tokenizer(
    ranks: dict[bytes, int], added: list[dict[str, Any]], pattern: str = K2_PATTERN
) -> tokenizers.Tokenizer:
    """A tokenizer that encodes as ``tiktoken.Encoding`` with these ranks and pattern does."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    names = {token: "".join(letters[value] for value in token) for token in ranks}
    model = models.BPE(
        vocab={names[token]: rank for token, rank in ranks.items()},
        merges=[(names[left], names[right]) for left, right in _merges(ranks)],
        ignore_merges=True,  # tiktoken takes a word that is a token whole
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token["content"], normalized=False, special=token["special"])
            for token in added
        ]
    )
    return tokenizer


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Merges in the order of the ranks.

    tiktoken merges any two neighbours whose union is a token, however that token came about, so
    every way to cut a token into two tokens is a merge of its rank.
    """
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return merges


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 stands for itself; the other 68 bytes take the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters: list[str] = []
    extra = 0x100
    for value in range(256):
        if value in printable:
            letters.append(chr(value))
        else:
            letters.append(chr(extra))
            extra += 1
    return letters
