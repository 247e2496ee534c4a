"""Names of files that a server gives: which may be used as paths below a folder, and which kinds.

Git allows names that other systems do not, and a server may send any. A name is used only if it
means the same file below the target folder on every system.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from k2cli.errors import K2Error
from k2cli.files import MAX_NAME_BYTES
from k2cli.units import one_line

_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]')
_MAX_PATH_BYTES = 1000
_SHOWN_LETTERS = 100

_DATA_ENDINGS = (
    ".json", ".safetensors", ".jinja", ".tiktoken", ".model", ".txt", ".md", ".gguf",
)  # fmt: skip
_DATA_NAMES = ("LICENSE", "NOTICE")


def is_data_name(name: str) -> bool:
    """True for the kinds of files that k2 downloads: data and texts, never code or pickles."""
    base = name.rpartition("/")[2]
    return base.endswith(_DATA_ENDINGS) or (base.startswith(_DATA_NAMES) and "." not in base)


def is_safe_name(name: str) -> bool:
    """True if a path of a repository names a file below the target folder on every system."""
    return _problem(name) is None


def _problem(name: str) -> str | None:
    if not name or name.startswith("/"):
        return "is no relative path"
    if _FORBIDDEN.search(name):
        return "has characters that not every system allows in a name"
    if len(name.encode("utf-8", "replace")) > _MAX_PATH_BYTES:
        return "is too long"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "leaves its folder"
        if part.startswith(" ") or part.endswith((" ", ".")):
            return "begins or ends with characters that some systems remove"
        if _RESERVED.fullmatch(part):
            return "is reserved on some systems"
        if len(part.encode("utf-8", "replace")) > MAX_NAME_BYTES:
            return "is too long"
    if name.split("/")[0].casefold() == ".cache":
        return "is where download tools keep their own files"
    return None


def check_names(names: Collection[str], where: str) -> None:
    """Check the names of all files that are about to be written into one folder.

    Raises:
        K2Error: for a name that could leave the folder, or two that some systems do not tell apart.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        if (problem := _problem(name)) is not None:
            raise K2Error(f"{where} has a file '{_shown(name)}': its name {problem}")
        folded = folded_name(name)
        if (other := seen.setdefault(folded, name)) != name:
            raise K2Error(
                f"{where} has both '{_shown(other)}' and '{_shown(name)}', which many volumes do "
                "not tell apart"
            )
    for name in sorted(names):
        parts = folded_name(name).split("/")
        for count in range(1, len(parts)):
            if (file := seen.get("/".join(parts[:count]))) is not None:
                raise K2Error(f"{where} has '{_shown(file)}' as a file and as a folder")


def folded_name(name: str) -> str:
    """Return the form that two names share if a volume may take one for the other."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _shown(name: str) -> str:
    text = one_line(name)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."
