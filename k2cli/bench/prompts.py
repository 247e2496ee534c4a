"""Prompts of an exact number of tokens, all of them different.

Words in random order, tokenized by the server and cut to length. No two begin alike, so a prefix
cache has nothing to reuse even where a server has one and does not honour a request to bypass it.
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
    """Makes prompts of token ids.

    Args:
        tokenize: text to token ids, without special tokens; asks the server.
        source: where randomness comes from.
    """

    def __init__(
        self, tokenize: Callable[[str], list[int]], source: random.Random | None = None
    ) -> None:
        self._tokenize = tokenize
        self._source = source or random.Random()
        self._words = _WORD_LIST.split()

    def make(self, length: int) -> list[int]:
        """A new prompt of exactly ``length`` tokens.

        Raises:
            K2Error: if the server's tokenizer does not give enough tokens.
        """
        words = length + 8
        for _ in range(_TRIES):
            tokens = self._tokenize(self._text(words))
            if len(tokens) >= length:
                return tokens[:length]
            words = max(words * 2, words * length // max(len(tokens), 1) + 8)
        raise K2Error(f"no prompt of {length} tokens could be made")

    def _text(self, words: int) -> str:
        # The first token decides whether two prompts share a prefix.
        first = f"{self._source.choice(self._words)}{self._source.randrange(10**6)}"
        return " ".join([first, *self._source.choices(self._words, k=words)])
