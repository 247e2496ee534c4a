"""Tokenizer of a checkpoint folder: text to tokens and back, and conversations to prompts.

Both ``tokenizer.json`` and K2's vocabulary in tiktoken's format are read. No code of the
checkpoint is run.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.models.checkpoint import end_tokens, read_json_object, shown
from k2cli.models.text.tiktoken_bpe import (
    build_tokenizer,
    byte_letters,
    find_vocabulary,
    read_ranks,
    special_tokens,
)

if TYPE_CHECKING:
    import tokenizers

    from k2cli.models.text.conversation import ConversationRenderer

# Bytes of a text before NFC per byte after it, at most: Unicode's table of normalization expansion
# (UAX #15) has 3 for UTF-8; one more for safety.
_NFC_SHRINKS = 4
_SLICE_LETTERS = 2**18
# A cut through a word can make this many tokens more than the word has.
_CUT_TOKENS = 64
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Tokenizer and chat template of a checkpoint. Use ``Tokenizer.load`` to create one."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        folder: Path,
        config: dict[str, Any],
        stop_tokens: frozenset[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._config = config
        self._special = _special_texts(config)
        self._renderers: dict[bool, ConversationRenderer] = {}
        self.stop_tokens = stop_tokens
        """Tokens that end an answer."""

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint.

        Raises:
            K2Error: if the folder has no tokenizer, or its files are damaged.
        """
        path = folder / "tokenizer_config.json"
        config = read_json_object(path) if path.is_file() else {}
        tokenizer = _load_tokenizer(folder, config)
        return cls(tokenizer, folder, config, _stop_tokens(folder, config, tokenizer))

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ones included; a padded head may be larger."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token_bytes(self) -> int | None:
        """The most bytes of a text that one token can stand for; None if there is no such limit.

        Only known for byte-level tokenizers, which drop nothing: a normalizer other than NFC, or an
        added token that strips the spaces beside it, can make any number of bytes disappear.
        """
        from tokenizers import decoders, normalizers

        tokenizer = self._tokenizer
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            return None
        if not isinstance(tokenizer.normalizer, normalizers.NFC | None):
            return None
        added = tokenizer.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip for token in added):
            return None
        # In a byte-level vocabulary a letter is a byte; added tokens are plain text.
        longest = max(map(len, tokenizer.get_vocab(with_added_tokens=False)), default=1)
        longest = max([longest, *(len(token.content.encode()) for token in added)])
        return longest if tokenizer.normalizer is None else longest * _NFC_SHRINKS

    def encode_within(
        self, text: str, max_tokens: int, add_special_tokens: bool = False
    ) -> list[int] | None:
        """Encode a text, or return None once it is certain that it has more tokens than the limit.

        A text of B bytes has at least B / ``longest_token_bytes`` tokens, so that one which is much
        too long is not read at all. Of others that are long, slices are counted first.
        """
        longest = self.longest_token_bytes if len(text) > max_tokens else None
        if longest is not None and len(text.encode(errors="replace")) > max_tokens * longest:
            return None
        if len(text) > _SLICE_LETTERS:
            count = 0
            for begin in range(0, len(text), _SLICE_LETTERS):
                count += len(self.encode(text[begin : begin + _SLICE_LETTERS])) - _CUT_TOKENS
                if count > max_tokens:
                    return None
        return self.encode(text, add_special_tokens)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Encode a text. Special tokens written in the text are recognised.

        Raises:
            K2Error: if the text is not valid Unicode (a lone surrogate), or the library fails.
        """
        try:
            text.encode()  # the library raises a TypeError
        except UnicodeEncodeError as error:
            raise K2Error("the text is not valid Unicode: it has a lone surrogate") from error
        with _refusing("the model's tokenizer fails on the text"):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token such as ``<|im_end|>``; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        **template_arguments: Any,
    ) -> str:
        """Render a conversation in the format that the model was trained on.

        Args:
            messages: turns in OpenAI's form.
            tools: the tools that the model may call.
            add_generation_prompt: end with the beginning of an answer.
            continue_last: the last turn is the beginning of the answer, which is not ended.
            template_arguments: variables of the template.

        Raises:
            K2Error: if the model has no chat template, or the template rejects the messages.
        """
        return self._renderer(with_tools=bool(tools)).render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_last=continue_last,
            variables=template_arguments,
        )

    @property
    def shows_tools(self) -> bool:
        """True if the chat template shows the tools of a request to the model.

        Raises:
            K2Error: if there is no chat template.
        """
        return self._renderer(with_tools=True).shows_tools

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        """Create an incremental decoder for one answer."""
        return TokenStream(self._tokenizer, skip_special_tokens)

    def _renderer(self, *, with_tools: bool) -> ConversationRenderer:
        if with_tools not in self._renderers:
            from k2cli.models.text.chat_template import ChatTemplate, read_chat_template
            from k2cli.models.text.conversation import ConversationRenderer

            source = read_chat_template(self._folder, self._config, with_tools=with_tools)
            if source is None:
                raise K2Error(
                    f"the model {self._folder.name} has no chat template",
                    "send a plain prompt to /v1/completions instead",
                )
            template = ChatTemplate(source, self._special)
            self._renderers[with_tools] = ConversationRenderer(template)
        return self._renderers[with_tools]


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


@contextlib.contextmanager
def _refusing(problem: str) -> Iterator[None]:
    """Turn errors of the library into a ``K2Error``; it has no specific ones.

    A panic of its Rust code on a damaged file is no ``Exception``, and would end the process.
    """
    try:
        yield
    except K2Error:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise K2Error(f"{problem}: {shown(str(error))}", "download it again") from error


def _special_ids(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(number for number, token in added.items() if token.special)


def _load_tokenizer(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    path = folder / "tokenizer.json"
    if path.is_file():
        with _refusing(f"{path} is not a tokenizer"):
            return tokenizers.Tokenizer.from_file(str(path))
    vocabulary = find_vocabulary(folder)
    if vocabulary is None:
        raise K2Error(f"{folder} has neither tokenizer.json nor tiktoken.model")
    if config.get("tokenizer_class") != "TikTokenTokenizer":
        # Other model families ship such a file but split text by other patterns.
        raise K2Error(
            f"{vocabulary} belongs to the tokenizer {config.get('tokenizer_class')!r}; "
            "k2 knows the pattern of 'TikTokenTokenizer' (Kimi) only",
            "use a conversion of the model that has a tokenizer.json",
        )
    ranks = read_ranks(vocabulary)
    named = config.get("added_tokens_decoder", {})
    if not isinstance(named, dict):
        raise K2Error(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is no object")
    with _refusing(f"{vocabulary} is not a tokenizer"):
        return build_tokenizer(ranks, special_tokens(vocabulary, len(ranks), named))


def _special_texts(config: dict[str, Any]) -> dict[str, str]:
    """Read ``bos_token`` and others, each a text or an object with ``content``."""
    texts: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            texts[name] = content
    return texts


def _stop_tokens(
    folder: Path, config: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> frozenset[int]:
    """Collect the end tokens of all files of the checkpoint.

    K2's config names [EOS], its generation config <|im_end|>; either one ends an answer.
    """
    stops: set[int] = set()
    end = _special_texts(config).get("eos_token")
    if end is not None and (number := tokenizer.token_to_id(end)) is not None:
        stops.add(number)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.exists():
            value: Any = read_json_object(path).get("eos_token_id")
            stops.update(end_tokens(path, value))
    return frozenset(stops)
