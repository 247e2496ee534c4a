"""Files of a model: which of those in a folder or a repository are read, and what else is there.

A pure choice by name, so that download, planning and loading take the same files. Folders hold more
than a model: adapters, ``original/`` copies, Mistral's ``consolidated.safetensors``, the files that
macOS puts beside others (``._x``), and indexes of an earlier conversion.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from k2cli.errors import K2Error

INDEX_NAME = "model.safetensors.index.json"

_SUPPORTING = frozenset({
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "tiktoken.model", "chat_template.jinja", "chat_template.json", "LICENSE",
})  # fmt: skip
"""Files that loading reads, or that ``k2 quantize`` takes along for other programs to read."""

_TEMPLATES = re.compile(r"additional_chat_templates/[\w.-]+\.jinja")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_POINTER = b"version https://git-lfs"
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)")
_SHOWN_NAMES = 6


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Names of the files that hold the weights, and what the user should know about the choice."""

    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def choose_weight_files(
    names: Collection[str], weight_map: Mapping[str, str] | None, where: str
) -> WeightFiles:
    """Choose the safetensors files that belong to the model.

    Args:
        names: all files of the folder or repository, by path.
        weight_map: the index, if there is one: the file of each tensor.
        where: the folder or repository, for messages.

    Raises:
        K2Error: if a file of the model is missing.
    """
    found = weights_without_index(names)
    if weight_map is None:
        _check_shards(found, where)
        return WeightFiles(tuple(found))
    named = sorted(set(weight_map.values()))
    absent = [name for name in named if name not in names]
    if not absent:
        return WeightFiles(tuple(named))
    if len(absent) < len(named) or not found:
        more = f" and {len(absent) - 1} more files" if len(absent) > 1 else ""
        raise K2Error(
            f"{where}/{INDEX_NAME} names {absent[0]}{more}, which the folder does not have",
            download_hint(Path(where)),
        )
    _check_shards(found, where)
    warning = (
        f"{where}/{INDEX_NAME} is stale: it names {absent[0]}, which is not there; "
        f"read instead: {listed(found)}"
    )
    return WeightFiles(tuple(found), (warning,))


def names_in(folder: Path) -> list[str]:
    """List the files of a folder, without folders and broken links (the Hub's cache has some).

    What is no regular file is listed, so that it is refused when it is opened.
    """
    return [name for name in os.listdir(folder) if _is_there(os.path.join(folder, name))]


def _is_there(path: str) -> bool:
    """True for what is no folder and no broken link."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise


def weights_without_index(names: Collection[str]) -> list[str]:
    """List the safetensors files of the model itself; adapters and other layouts are left out."""
    own = sorted(name for name in names if is_own(name) and name.endswith(".safetensors"))
    # mlx-lm takes only files whose name starts with 'model'.
    named = [name for name in own if name.startswith("model")]
    return named or [name for name in own if not name.startswith(("adapter", "consolidated"))]


def is_own(name: str) -> bool:
    """True if a path names a file of the folder itself that no system put beside others."""
    return "/" not in name and not name.startswith(".")


def _check_shards(names: list[str], where: str) -> None:
    """Check that no file of a numbered series is missing.

    Raises:
        K2Error: naming the first that is.
    """
    present, checked = set(names), set()
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is None or (series := match.group("stem", "count", "suffix")) in checked:
            continue
        checked.add(series)
        for number in range(1, min(int(match["count"]), 9999) + 1):
            wanted = f"{match['stem']}-{number:05d}-of-{match['count']}{match['suffix']}"
            if wanted not in present:
                raise K2Error(f"{where} has {name}, but not {wanted}", download_hint(Path(where)))


def supporting_files(names: Collection[str]) -> list[str]:
    """List the files beside the weights that a download fetches: config, tokenizer, templates."""
    return sorted(
        name
        for name in names
        if name in _SUPPORTING
        or _TEMPLATES.fullmatch(name)
        or (is_own(name) and name.startswith(("LICENSE.", "NOTICE")))
        or (is_own(name) and name.endswith(".tiktoken"))
    )


def no_safetensors_error(names: Collection[str], where: str, repo: str | None) -> K2Error:
    """Return the error for a folder or repository without weights that k2 reads.

    Args:
        names: all files, by path.
        where: the folder or repository, for the message.
        repo: the repository's name; None for a folder.
    """
    gguf = sorted(name for name in names if is_own(Path(name).name) and name.endswith(".gguf"))
    if gguf:
        return K2Error(
            f"{where} has no .safetensors files, but GGUF files: {listed(gguf)}",
            _gguf_command(gguf[0], where, repo),
        )
    own = [name for name in names if is_own(name)]
    for what, found in (
        ("Mistral's own layout", [n for n in own if n.startswith("consolidated")]),
        ("pickled weights", [n for n in own if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]),
    ):
        if found:
            return K2Error(
                f"{where} has no .safetensors files that k2 reads, only {what}: {listed(found)}",
                "choose a conversion of the model to safetensors, such as one of mlx-community",
            )
    return K2Error(
        f"{where} has no .safetensors files",
        "choose a repository that holds a model" if repo else "give the folder of a checkpoint",
    )


def _beside(where: str, name: str) -> str:
    """Return the path of a file, which begins with a dot or a slash, as paths of models must."""
    path = os.path.normpath(f"{where}/{name}")
    return path if path.startswith(("/", ".", "~")) else f"./{path}"


def _gguf_command(name: str, where: str, repo: str | None) -> str:
    """Return the command that takes one of several GGUF files."""
    if repo is None:
        return f"k2 plan-memory {shlex.quote(_beside(where, name))}"
    match = _SHARD.fullmatch(name)
    wanted = f"{match['stem']}-*-of-{match['count']}.gguf" if match else name
    return f"hf download {repo} --include {shlex.quote(wanted)} --local-dir ."


def listed(names: list[str]) -> str:
    """Format names for a message; of many, only the first."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def download_hint(path: Path) -> str:
    """Return what fetches a damaged or missing file again: a command, if its origin is known."""
    for part in path.parts:
        if (match := _HUB_CACHE.fullmatch(part)) is not None:
            return f"k2 download {match[1]}/{match[2]}"
    return "download it again"


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a file that is only a pointer of Git LFS, as a clone without it has.

    Args:
        path: the file, or its place in a repository.
        start: its first bytes, at least 8.

    Raises:
        K2Error: if they are those of a pointer.
    """
    if len(start) >= 8 and _POINTER.startswith(start[: len(_POINTER)]):
        raise K2Error(
            f"{path} is a Git LFS pointer, not the file itself",
            f"git -C {shlex.quote(str(path.parent))} lfs pull",
        )


def split_parts(path: Path) -> list[Path]:
    """List the files of a split GGUF, in order, from any one of them; of another file itself."""
    match = _SHARD.fullmatch(path.name)
    if match is None or match["suffix"] != ".gguf" or not 0 < int(match["count"]) <= 9999:
        return [path]
    return [
        path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
        for number in range(1, int(match["count"]) + 1)
    ]
