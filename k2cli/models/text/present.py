"""The check of a checkpoint's text files before any process of a run is started.

Everything that costs no library is found here, in the launcher: a missing tokenizer, files that are
only pointers of Git LFS, and end tokens that the model cannot produce. The leader's guard tries the
tokenizer and the templates themselves (``launch_check``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.json_files import (
    end_tokens,
    read_generation_config,
    read_json_if_present,
    read_json_object,
)
from k2cli.models.layout import refuse_pointer
from k2cli.models.text.tokenizer_file import tokenizer_file

_TEXTS = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
_OBJECTS = ("tokenizer_config.json", "chat_template.json")
_POINTER_BYTES = 64


def check_text_files(folder: Path) -> None:
    """Check that tokenizer, templates and end tokens are there and are what they seem.

    Raises:
        K2Error: naming the file and what is wrong with it.
    """
    for path in (tokenizer_file(folder), *(folder / name for name in _TEXTS)):
        if os.path.lexists(path):
            _refuse_pointer(path)
    for name in _OBJECTS:
        read_json_if_present(folder / name)
    config = read_json_object(folder / "config.json")
    _check_end_tokens(folder, config)


def _refuse_pointer(path: Path) -> None:
    try:
        with os.fdopen(open_regular(path, follow_links=True), "rb") as stream:
            refuse_pointer(path, stream.read(_POINTER_BYTES))
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error


def _check_end_tokens(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse end tokens none of which the model has: no answer would ever end by itself."""
    text = config.get("text_config")
    size = (text if isinstance(text, Mapping) else config).get("vocab_size")
    named = {
        "config.json": end_tokens(folder / "config.json", config.get("eos_token_id")),
        "generation_config.json": end_tokens(
            folder / "generation_config.json", read_generation_config(folder).get("eos_token_id")
        ),
    }
    given = [token for tokens in named.values() for token in tokens]
    if not given or not isinstance(size, int) or any(token < size for token in given):
        return
    file = next(name for name, tokens in named.items() if tokens)
    raise K2Error(
        f"{folder / file}: eos_token_id is {named[file][0]}, but the model has {size} tokens, "
        "numbered from 0: no answer would end",
        "take the file from the model's repository",
    )
