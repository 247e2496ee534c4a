"""Choice of the files of a repository that a download takes."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from k2cli.errors import UsageError
from k2cli.models.layout import (
    INDEX_NAME,
    choose_weight_files,
    listed,
    supporting_files,
)
from k2cli.models.sources.file_names import is_data_name

Kind = Literal["config", "tokenizer", "weights"]
KINDS: tuple[Kind, ...] = ("config", "tokenizer", "weights")

_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt"
    r"|.*\.tiktoken|tiktoken\.model|chat_template\.(?:jinja|json)|additional_chat_templates/.*"
)
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")


@dataclass(frozen=True, slots=True)
class Selection:
    """Wishes of the user about files; the default is what loading reads.

    ``include`` has patterns that replace this default, among the kinds of files that k2 downloads.
    ``only`` and ``exclude`` then take files away.
    """

    only: tuple[Kind, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def is_default(self) -> bool:
        """True if nothing is wished for."""
        return not (self.only or self.include or self.exclude)


@dataclass(frozen=True, slots=True)
class ChosenFiles:
    """Names of files to download. ``whole`` is True if they are all that loading reads."""

    names: tuple[str, ...]
    whole: bool


def kinds_of(names: Collection[str]) -> tuple[Kind, ...]:
    """Read the names of kinds.

    Raises:
        UsageError: if one is not the name of a kind.
    """
    for name in names:
        if name not in KINDS:
            raise UsageError(f"--only '{name}' is not one of {', '.join(KINDS)}", "--only weights")
    return tuple(kind for kind in KINDS if kind in names)


def kind_of(name: str) -> Kind:
    """Return the kind of a file: what is neither weights nor tokenizer belongs to the config."""
    if name.endswith(_WEIGHTS):
        return "weights"
    return "tokenizer" if _TOKENIZER.fullmatch(name) else "config"


def choose_files(
    names: Collection[str], weight_map: Mapping[str, str] | None, repo: str, selection: Selection
) -> ChosenFiles:
    """Choose the files of a repository with these files.

    Args:
        weight_map: the repository's index, if there is one.

    Raises:
        UsageError: if the wishes leave nothing, or name files that k2 does not download.
        K2Error: if a file of the model is missing.
    """
    weights = choose_weight_files(names, weight_map, repo).names
    index = [INDEX_NAME] if weight_map is not None else []
    needed = [*supporting_files(names), *index, *weights] if weights else []
    if selection.is_default:
        return ChosenFiles(tuple(needed), whole=True)
    if selection.include:
        chosen = _included(names, selection.include, repo)
    else:
        chosen = needed or supporting_files(names)
    chosen = [
        name
        for name in chosen
        if (not selection.only or kind_of(name) in selection.only)
        and not any(_matches(name, pattern) for pattern in selection.exclude)
    ]
    if not chosen:
        raise UsageError(
            f"{repo} has no files that {_described(selection)} leaves",
            f"it has: {listed(sorted(name for name in names if is_data_name(name)))}",
        )
    return ChosenFiles(tuple(sorted(chosen)), whole=bool(needed) and set(needed) <= set(chosen))


def _included(names: Collection[str], patterns: tuple[str, ...], repo: str) -> list[str]:
    chosen: list[str] = []
    for pattern in patterns:
        matching = [name for name in names if _matches(name, pattern)]
        data = [name for name in matching if is_data_name(name)]
        if matching and not data:
            raise UsageError(
                f"--include '{pattern}' names {listed(sorted(matching))}: k2 downloads data and "
                "texts, but neither code nor pickles",
                f"if you trust its owner: hf download {repo} --include {shlex.quote(pattern)}",
            )
        chosen += [name for name in data if name not in chosen]
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def _described(selection: Selection) -> str:
    words = [
        *(f"--only {kind}" for kind in selection.only),
        *(f"--include '{pattern}'" for pattern in selection.include),
        *(f"--exclude '{pattern}'" for pattern in selection.exclude),
    ]
    return " ".join(words)
