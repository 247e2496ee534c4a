"""The file of a checkpoint that has the vocabulary, in its three formats, and how it is read.

``tokenizer.json``, sentencepiece's ``tokenizer.model`` and Kimi's ``tiktoken.model`` all become a
tokenizer of the tokenizers library, whose errors are turned into errors of k2 here. No code of the
checkpoint is run.
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
from k2cli.models.json_files import shown
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
    """Read the tokenizer of a checkpoint with the tokenizers library.

    Args:
        folder: the checkpoint.
        config: its ``tokenizer_config.json``.

    Raises:
        K2Error: if the folder has no tokenizer, or one that is damaged or that k2 does not know.
    """
    vocabulary = tokenizer_file(folder)
    if vocabulary.name == "tokenizer.json":
        return _load_json(vocabulary)
    if vocabulary.name == FILE_NAME:
        with library_errors(f"{vocabulary} is not a tokenizer"):
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
    with library_errors(f"{vocabulary} is not a tokenizer", download_hint(vocabulary)):
        return build_tokenizer(ranks, added)


def _load_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        data = read_regular(path, _MAX_FILE_BYTES, follow_links=True)
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error
    refuse_pointer(path, data)
    with library_errors(f"{path} is not a tokenizer", download_hint(path)):
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
def library_errors(message: str, hint: str | None = None) -> Iterator[None]:
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
