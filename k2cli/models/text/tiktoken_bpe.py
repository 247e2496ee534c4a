"""Conversion of K2's vocabulary file (tiktoken's format) to a ``tokenizers`` byte-level BPE.

K2 ships its tokenizer as ranks in ``tiktoken.model`` and a Python file. The file adds two things,
the pattern that splits text into words and the 256 reserved special tokens. Both are restated
here, so that no code of the repository is run.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.models.json_files import shown

if TYPE_CHECKING:
    import tokenizers

_MAX_FILE_BYTES = 200_000_000
_MAX_TOKEN_BYTES = 4096
RESERVED_SPECIAL_TOKENS = 256
"""Number of special tokens after the ranks; unnamed ones are ``<|reserved_token_ID|>``."""

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
"""Pattern that splits text into words: Chinese, then words by case, numbers by three digits."""


def find_vocabulary(folder: Path) -> Path | None:
    """Return the path of the folder's vocabulary in tiktoken's format, if it has one."""
    named = folder / "tiktoken.model"
    # macOS puts files named ._x beside others.
    others = sorted(folder.glob("[!.]*.tiktoken"))
    return named if os.path.lexists(named) else next(iter(others), None)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the rank of each token from lines of ``base64 rank``.

    Raises:
        K2Error: if a line is malformed, a rank or token is repeated, or a byte has no token.
    """
    try:
        lines = read_regular(path, _MAX_FILE_BYTES, follow_links=True).splitlines()
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
    """Make the added tokens with ids from ``first`` on, in the form of ``tokenizer.json``.

    Args:
        path: the vocabulary, which messages name.
        first: the number of ranks.
        named: ``added_tokens_decoder`` of ``tokenizer_config.json``: fields by id.

    Raises:
        K2Error: if a named token is outside the reserved ids, or has no text.
    """
    past_last = first + RESERVED_SPECIAL_TOKENS
    contents: dict[int, dict[str, Any]] = {}
    for key, fields in named.items():
        content = fields.get("content") if isinstance(fields, dict) else None
        is_id = key.isdecimal() and len(key) < 10 and first <= int(key) < past_last
        if not is_id or not isinstance(content, str) or not content:
            raise K2Error(
                f"{path.parent / 'tokenizer_config.json'}: the special token {shown(key)} must "
                f"have text and an id from {first} to {past_last - 1}"
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
    """Build a tokenizer equivalent to ``tiktoken.Encoding`` with these ranks and pattern."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    names = {token: "".join(letters[value] for value in token) for token in ranks}
    model = models.BPE(
        vocab={names[token]: rank for token, rank in ranks.items()},
        merges=[(names[left], names[right]) for left, right in _merges(ranks)],
        ignore_merges=True,  # as tiktoken: a word that is a token is not split
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
    """List the merges in the order of the ranks.

    tiktoken merges any two neighbours whose concatenation is a token, so every way to split a
    token into two tokens is a merge of its rank.
    """
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return merges


def byte_letters() -> list[str]:
    """Return GPT-2's table of the printable letter for each byte of a byte-level vocabulary.

    Printable Latin-1 bytes map to themselves; the other 68 bytes to letters from U+0100 on.
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
