"""The files of a checkpoint's tokenizer: which one there is, and what it contains.

They are ``tokenizer.json``, K2's vocabulary in tiktoken's format, or one of SentencePiece.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.models.json_files import (
    end_tokens,
    read_generation_config,
    read_json_if_present,
    shown,
)
from k2cli.models.layout import download_hint, refuse_pointer
from k2cli.models.text.sentencepiece_model import FILE_NAME, load_sentencepiece
from k2cli.models.text.tiktoken_bpe import (
    build_tokenizer,
    find_vocabulary,
    read_ranks,
    special_tokens,
)

if TYPE_CHECKING:
    import tokenizers

_MAX_FILE_BYTES = 200_000_000
"""The largest known tokenizer.json has about 35 MB."""

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_file(folder: Path) -> Path:
    """Return the file that has the vocabulary.

    Raises:
        K2Error: if the folder has none.
    """
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        return path
    vocabulary = find_vocabulary(folder)
    if vocabulary is None and os.path.lexists(folder / FILE_NAME):
        return folder / FILE_NAME
    if vocabulary is None:
        raise K2Error(
            f"{folder} has neither tokenizer.json nor tiktoken.model nor tokenizer.model",
            download_hint(folder),
        )
    return vocabulary


def load_tokenizer(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the library's tokenizer from whichever file a checkpoint has.

    Raises:
        K2Error: if the file is no tokenizer, or one of a kind that k2 does not know.
    """
    vocabulary = tokenizer_file(folder)
    if vocabulary.name == "tokenizer.json":
        return _load_json(vocabulary)
    if vocabulary.name == FILE_NAME:
        with tokenizer_errors(f"{vocabulary} is not a tokenizer"):
            return load_sentencepiece(folder, config)
    if config.get("tokenizer_class") != "TikTokenTokenizer":
        # Other model families ship such a file but split text by other patterns.
        raise K2Error(
            f"{vocabulary} belongs to the tokenizer {shown(config.get('tokenizer_class'))}; "
            "k2 knows the pattern of 'TikTokenTokenizer' (Kimi) only",
            "use a conversion of the model that has a tokenizer.json",
        )
    ranks = read_ranks(vocabulary)
    named = config.get("added_tokens_decoder", {})
    if not isinstance(named, dict):
        raise K2Error(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is no object")
    added = special_tokens(vocabulary, len(ranks), named)
    with tokenizer_errors(f"{vocabulary} is not a tokenizer", download_hint(vocabulary)):
        return build_tokenizer(ranks, added)


def _load_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        data = read_regular(path, _MAX_FILE_BYTES, follow_links=True)
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error
    refuse_pointer(path, data)
    with tokenizer_errors(f"{path} is not a tokenizer", download_hint(path)):
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    if any("Regex" in part for part in parts_of(tokenizer.decoder)):
        # Answers are decoded in the guard, which must never wait for a regular expression.
        raise K2Error(f"{path}: its decoder has a regular expression, which k2 does not run")
    return tokenizer


def parts_of(component: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in the description of a normalizer, pre-tokenizer or decoder, if any."""
    found = [json.loads(component.__getstate__())] if component is not None else []
    while found:
        part = found.pop()
        if isinstance(part, dict):
            yield part
        found += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


@contextlib.contextmanager
def tokenizer_errors(message: str, hint: str | None = None) -> Iterator[None]:
    """Turn errors of the tokenizers library into errors of k2."""
    try:
        yield
    except K2Error:
        raise
    except Exception as error:  # the library has no more specific error
        raise K2Error(f"{message}: {shown(str(error))}", hint) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise K2Error(f"{message}: {shown(str(error))}", "use another copy of it") from error


def is_panic(error: BaseException | None) -> bool:
    """True for a panic of the tokenizers library, which is no ``Exception``.

    Its regular expressions give up like that after ten million steps.
    """
    return type(error).__name__ == "PanicException"


def special_texts(config: dict[str, Any]) -> dict[str, str]:
    """Read ``bos_token`` and others, each a text or an object with ``content``."""
    texts: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            texts[name] = content
    return texts


def read_stop_tokens(
    folder: Path, config: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> frozenset[int]:
    """Collect the end tokens of all files of the checkpoint.

    K2's config names [EOS], its generation config <|im_end|>; either one ends an answer.
    """
    stops: set[int] = set()
    end = special_texts(config).get("eos_token")
    if end is not None and (number := tokenizer.token_to_id(end)) is not None:
        stops.add(number)
    path = folder / "config.json"
    stops.update(end_tokens(path, read_json_if_present(path).get("eos_token_id")))
    stops.update(end_tokens(path, read_generation_config(folder).get("eos_token_id")))
    return frozenset(stops)
