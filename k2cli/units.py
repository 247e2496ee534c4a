"""Conversion of bytes, durations and rates to and from text, and cleaning of foreign text.

Bytes are integers everywhere, and only this module formats them. GB is 10^9 bytes and GiB is 2^30
bytes.
"""

from __future__ import annotations

import re

from k2cli.errors import UsageError

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_BYTE_UNITS = {
    "": 1, "B": 1, "KB": KB, "MB": MB, "GB": GB, "TB": TB,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB,
    "K": KB, "M": MB, "G": GB, "T": TB,
}  # fmt: skip
_BYTES_PATTERN = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*")


def format_bytes(count: int) -> str:
    """Render in decimal units with three significant figures: ``577.6 GB``, ``98.4 MB``."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    size = min(size, 10**30)  # a number in a foreign file may be too large for a float
    for unit, name in ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB")):
        if size >= unit:
            value = size / unit
            return f"{sign}{value:.{2 if name == 'TB' else 1}f} {name}"
    return f"{sign}{size} B"


def format_rate(count: int, seconds: float) -> str:
    """Render bytes per second: ``3.42 GB/s``; empty if nothing was counted or no time passed."""
    return f"{count / seconds / GB:.2f} GB/s" if count > 0 and seconds > 0 else ""


def whole_number(text: str) -> int | None:
    """Read a number of up to 18 ASCII digits; None for any other text.

    ``str.isdigit`` accepts ``²``, and ``int`` refuses thousands of digits with a ValueError.
    """
    return int(text) if len(text) <= 18 and text.isascii() and text.isdecimal() else None


def format_gib(count: int) -> str:
    """Render in gibibytes, for limits that the system counts in them: ``464.0 GiB``."""
    return f"{count / GIB:.1f} GiB"


def parse_bytes(text: str) -> int:
    """Read ``512GB``, ``464 GiB``, ``1.5TB`` or a plain number of bytes.

    Raises:
        UsageError: if the text is not a size, or its unit is unknown.
    """
    match = _BYTES_PATTERN.fullmatch(text)
    unit = _BYTE_UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"'{text}' is not a size", "write for example 512GB or 464GiB")
    return int(float(match.group(1)) * unit)


_SEQUENCE = (
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x00-\x1f\x7f-\x9f]*(?:\x07|\x9c|\x1b\\)"  # OSC, DCS
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI
)
_UNSAFE = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
_UNSAFE_CHARACTER = re.compile(_UNSAFE)
_CONTROL = re.compile(f"{_SEQUENCE}|{_UNSAFE}|[\ud800-\udfff]")
_CONTROL_CHARACTER = re.compile(f"{_UNSAFE}|[\ud800-\udfff]")


def clean_text(text: str, keep: str = "\n\t") -> str:
    """Remove what could control a terminal from text that is not k2's own.

    Escape sequences, C0 and C1 controls and changes of the writing direction go, except for the
    characters in ``keep``. Other line breaks and tabs become spaces, and lone surrogates, which
    stand for a name's undecodable bytes and cannot be printed, become U+FFFD.
    """

    return _cleaned(_CONTROL, text, keep)


def clean_piece(text: str, keep: str = "\n\t") -> str:
    """Remove control characters as ``clean_text`` does, from a piece of a stream.

    The rest of an escape sequence stays as harmless text, because a sequence may be cut anywhere:
    the result does not depend on how a text is divided into pieces.
    """
    return _cleaned(_CONTROL_CHARACTER, text, keep)


def _cleaned(pattern: re.Pattern[str], text: str, keep: str) -> str:
    def replacement(match: re.Match[str]) -> str:
        found = match.group()
        if found in keep:
            return found
        if "\ud800" <= found <= "\udfff":
            return "\ufffd"
        return " " if found in "\n\t\u2028\u2029" else ""

    return text if text.isascii() and text.isprintable() else pattern.sub(replacement, text)


_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb]"
)


def one_line(text: str) -> str:
    """Remove the same, and every line break and tab: for a name inside a sentence or a table.

    Characters that draw nothing become U+FFFD, since two names that differ must look different.
    Joiners stay: scripts and emoji need them.
    """
    return _INVISIBLE.sub("\ufffd", clean_text(text, keep=""))


SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of UTF-16 pairs, which no valid text has."""


def replace_surrogates(text: str) -> str:
    """Put U+FFFD in place of lone surrogates, which stand for undecodable bytes of a name."""
    return SURROGATE.sub("\ufffd", text)


def escape_json(document: str) -> str:
    """Escape in a JSON document the control characters that JSON allows in strings."""
    return _UNSAFE_CHARACTER.sub(
        lambda match: match.group() if match.group() in "\n\t" else f"\\u{ord(match.group()):04x}",
        document,
    )


_LATENCY_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_LATENCY_PATTERN = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-zµ]+)\s*")


def parse_latency(text: str) -> float:
    """Read a short duration with its unit, such as ``26us`` or ``0.3 ms``, as seconds.

    Raises:
        UsageError: if the text is not a duration, or has no unit.
    """
    match = _LATENCY_PATTERN.fullmatch(text)
    unit = _LATENCY_UNITS.get(match.group(2)) if match else None
    if match is None or unit is None:
        raise UsageError(f"'{text}' is not a latency", "write for example 26us or 0.3ms")
    return float(match.group(1)) * unit


_TOKEN_UNITS = {"": 1, "k": KIB, "m": MIB}
_TOKENS_PATTERN = re.compile(r"\s*(-?\d{1,12}|\d{1,3}(?:[,_]\d{3}){1,3})\s*([kKmM]?)\s*")


def parse_tokens(text: str) -> int:
    """Read a number of tokens: ``131072``, or ``128k`` in units of 1024 as in names of models.

    ``131,072``, as k2 prints it, and ``131_072`` are understood too.

    Raises:
        UsageError: if the text is not a whole number.
    """
    match = _TOKENS_PATTERN.fullmatch(text)
    if match is None:
        raise UsageError(f"'{text}' is not a number of tokens", "write for example 131072 or 128k")
    number = match.group(1).replace(",", "").replace("_", "")
    return int(number) * _TOKEN_UNITS[match.group(2).lower()]


def format_duration(seconds: float) -> str:
    """Render a duration: ``850 ms``, ``12.3 s``, ``4 min 05 s``, ``2 h 03 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
