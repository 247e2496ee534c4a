"""Tokenizer of a checkpoint folder: text to tokens and back, and conversations to prompts.

``tokenizer_file`` reads the files. A text of a client is encoded here within bounds: one that
cannot fit into the context is not tokenized to its end.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.models.json_files import (
    end_tokens,
    read_generation_config,
    read_json_if_present,
)
from k2cli.models.text.literal_markers import SEPARATOR, LiteralMarkers
from k2cli.models.text.token_stream import TokenStream
from k2cli.models.text.tokenizer_file import library_errors, load_tokenizer, parts_of

if TYPE_CHECKING:
    import tokenizers

    from k2cli.models.text.chat_template import ChatTemplate, TemplateSources
    from k2cli.models.text.conversation_renderer import ConversationRenderer

_NFC_SHRINKS = 4
"""Bytes of a text before NFC per byte after it, at most.

Unicode's table of normalization expansion (UAX #15) has 3 for UTF-8; this is one more for safety.
"""

_SLICE_LETTERS = 2**18
"""Letters of the slices in which a long text is counted, so that counting can stop early."""

_CUT_TOKENS = 64
"""Tokens that a cut through a word can add to those of the word, at most."""

_REASONING_TAGS = ("<think>", "</think>")
"""Tags that are control tokens even if neither the vocabulary nor the template says so."""

# [THINK], <seed:think>, <|think:start|>, and those of others.
_REASONING_TAG = re.compile(r"\W*(\w+[:_])?think(ing)?([:_]\w+)?\W*", re.IGNORECASE)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Tokenizer and chat template of a checkpoint. Use ``Tokenizer.load`` to create one."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        folder: Path,
        config: dict[str, Any],
        stop_tokens: frozenset[int],
        templates: TemplateSources,
    ) -> None:
        self._tokenizer = tokenizer
        self._name = folder.name
        self._special = _special_texts(config)
        self.template_sources = templates
        self._templates: dict[str, ChatTemplate] = {}
        self._renderers: dict[bool, ConversationRenderer] = {}
        self.stop_tokens = stop_tokens
        """Tokens that end an answer."""
        self.tool_parser_type = config.get("tool_parser_type")
        """The form of tool calls that a conversion by mlx-lm names, if it does."""

    @classmethod
    def load(cls, folder: Path, templates: TemplateSources | None = None) -> Tokenizer:
        """Read the tokenizer of a checkpoint.

        Args:
            templates: chat templates that were read before; None to read them.

        Raises:
            K2Error: if the folder has no tokenizer, or its files are damaged.
        """
        from k2cli.models.text.chat_template import read_chat_templates

        config = read_json_if_present(folder / "tokenizer_config.json")
        tokenizer = load_tokenizer(folder, config)
        stop_tokens = _stop_tokens(folder, config, tokenizer)
        templates = templates or read_chat_templates(folder, config)
        return cls(tokenizer, folder, config, stop_tokens, templates)

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

    @property
    def pattern_letters(self) -> str:
        """The characters of the regular expressions that normalize and split texts, each once."""
        found: dict[str, None] = {}
        for component in (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer):
            for part in parts_of(component):
                if isinstance(pattern := part.get("Regex"), str):
                    found |= dict.fromkeys(pattern)
        return "".join(found)

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

        Parts of it between ``literal_markers.SEPARATOR``, if it has some, are encoded one by one.

        Raises:
            K2Error: if the text is not valid Unicode (a lone surrogate), or makes the library fail.
        """
        try:
            text.encode()  # the library raises a TypeError
        except UnicodeEncodeError as error:
            raise K2Error("the text is not valid Unicode: it has a lone surrogate") from error
        first, *others = text.split(SEPARATOR)
        with library_errors("the model's tokenizer fails on the text"):
            ids = list(self._tokenizer.encode(first, add_special_tokens=add_special_tokens).ids)
            for part in others:
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return ids

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

    def template(self, *, with_tools: bool) -> ChatTemplate | None:
        """Return the compiled chat template for requests with or without tools, if there is one.

        Raises:
            K2Error: if it is not valid.
        """
        sources = self.template_sources
        source = sources.with_tools if with_tools else sources.plain
        if source is None:
            return None
        if source not in self._templates:
            from k2cli.models.text.chat_template import ChatTemplate

            self._templates[source] = ChatTemplate(source, self._special)
        return self._templates[source]

    def _renderer(self, *, with_tools: bool) -> ConversationRenderer:
        if with_tools not in self._renderers:
            from k2cli.models.text.conversation_renderer import ConversationRenderer

            template = self.template(with_tools=with_tools)
            if template is None and (others := self.template_sources.others):
                raise K2Error(
                    f"of the chat templates {others} none is named 'default'",
                    "send a plain prompt to /v1/completions instead",
                )
            if template is None:
                raise K2Error(
                    f"the model {self._name} has no chat template",
                    "send a plain prompt to /v1/completions instead",
                )
            self._renderers[with_tools] = ConversationRenderer(template, self._markers(template))
        return self._renderers[with_tools]

    def _markers(self, template: ChatTemplate) -> LiteralMarkers:
        """Collect the texts of control tokens: special tokens, and others that the template writes.

        Some vocabularies have added tokens for ordinary text, such as HTML tags. Those that the
        template looks for in the texts of clients keep their meaning there. In an assistant's
        content, tags of reasoning and tokens that are not special keep theirs, too: the text of an
        answer has them. It has a special token only where the model quotes it in ordinary letters.
        """
        source = template.source
        texts, own = [], []
        for token in self._tokenizer.get_added_tokens_decoder().values():
            sought = any(f"with({quote}{token.content}{quote})" in source for quote in "'\"")
            known = token.special or token.content in source or token.content in _REASONING_TAGS
            if known and not sought:
                texts.append(token.content)
                if not token.special or _REASONING_TAG.fullmatch(token.content):
                    own.append(token.content)
        return LiteralMarkers([text for text in texts if not text.isspace()], own)


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
    path = folder / "config.json"
    stops.update(end_tokens(path, read_json_if_present(path).get("eos_token_id")))
    stops.update(end_tokens(path, read_generation_config(folder).get("eos_token_id")))
    return frozenset(stops)
