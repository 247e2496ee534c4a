"""Different prompts of an exact number of tokens.

A prompt is a list of random words, tokenized by the server and cut to length. No two prompts begin
alike, so a server with a prefix cache cannot reuse it, even if it ignores a request to bypass it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from k2cli.errors import K2Error

_WORD_LIST = (
    "the of and to in is that it was for on are with as his they be at one have this from or had "
    "by hot word but what some we can out other were all there when up use your how said an each "
    "she which do their time if will way about many then them write would like so these her long "
    "make thing see him two has look more day could go come did number sound no most people my "
    "over know water than call first who may down side been now find any new work part take get "
    "place made live where after back little only round man year came show every good me give our "
    "under name very through just form sentence great think say help low line differ turn cause "
    "much mean before move right boy old too same tell does set three want air well also play "
    "small end put home read hand port large spell add even land here must big high such follow "
    "act why ask men change went light kind off need house picture try us again animal point"
)
_TRIES = 8


class PromptMaker:
    """Generator of prompts of token ids.

    Args:
        tokenize: function of the server that tokenizes text without special tokens.
        source: random number generator.
    """

    def __init__(
        self, tokenize: Callable[[str], list[int]], source: random.Random | None = None
    ) -> None:
        self._tokenize = tokenize
        self._source = source or random.Random()
        self._words = _WORD_LIST.split()

    def make(self, length: int) -> list[int]:
        """Return a new prompt of exactly ``length`` tokens.

        Raises:
            K2Error: if the server's tokenizer does not return enough tokens.
        """
        words = length + 8
        for _ in range(_TRIES):
            tokens = self._tokenize(self._text(words))
            if len(tokens) >= length:
                return tokens[:length]
            words = max(words * 2, words * length // max(len(tokens), 1) + 8)
        raise K2Error(
            f"cannot make a prompt of {length} tokens: the server's tokenizer returns too few"
        )

    def _text(self, words: int) -> str:
        # Prompts with different first tokens share no prefix.
        first = f"{self._source.choice(self._words)}{self._source.randrange(10**6)}"
        return " ".join([first, *self._source.choices(self._words, k=words)])
