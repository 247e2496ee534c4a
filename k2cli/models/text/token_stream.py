"""Incremental decoding of an answer: the text that each new token completes."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from k2cli.models.text.tiktoken_bpe import byte_letters

if TYPE_CHECKING:
    import tokenizers


class TokenStream:
    """Incremental decoder that never returns part of a character; see ``Tokenizer.stream``.

    The results of all ``push`` and the final ``finish`` together equal that of ``decode``.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        from tokenizers import decoders

        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        if self._byte_level:
            self._letters = {letter: value for value, letter in enumerate(byte_letters())}
            self._special = _special_ids(tokenizer) if skip_special_tokens else frozenset()
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        else:
            self._steps = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)
            self._ids: list[int] = []
            self._emitted = ""

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now complete, which may be empty."""
        if self._byte_level:
            return self._utf8.decode(self._bytes(token_id))
        self._ids.append(token_id)
        text = self._steps.step(self._tokenizer, token_id) or ""
        self._emitted += text
        return text

    def finish(self) -> str:
        """Return the remaining text, held back because more bytes might have followed."""
        if self._byte_level:
            return self._utf8.decode(b"", final=True)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        return text[len(self._emitted) :]

    def _bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:
            return b""
        try:
            return bytes([self._letters[letter] for letter in token])
        except KeyError:  # an added token with a letter outside the table is plain text
            return token.encode()


def _special_ids(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(number for number, token in added.items() if token.special)
