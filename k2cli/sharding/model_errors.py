"""Explanations of failures inside a model's own code.

mlx-lm's model files check little: a config that lacks a field, or a device without a kernel, shows
as an error of Python or MLX at the place where the code fails, which does not help a user. This
module reads that place (traceback, source) for the cause: a field of the config, a missing
argument, a kernel, a dimension that does not divide. An error that mlx-lm raises itself is quoted.
"""

from __future__ import annotations

import ast
import contextlib
import json
import linecache
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from k2cli.errors import UsageError

_IN_FOLDER = {
    "config.json": "{folder}/config.json",
    "the checkpoint ": "the checkpoint in {folder} ",
}
_MODELS = ("mlx_lm", "models")
_MISSING = re.compile(r"__init__\(\) missing \d+ required \S+ arguments?: (.*)", re.DOTALL)
_UNEVEN = re.compile(r"attempting (\d+) splits along axis (\d+) for shape \(([\d,]+)\)")
_NO_ENTRY = re.compile(r"(.+) is not in (?:list|tuple)")
_HOLDERS = frozenset({"args", "config", "text_config"})
_LONGEST_QUOTE = 160


@contextlib.contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Name the folder of a checkpoint in errors about its ``config.json`` or its tensors.

    Raises:
        UsageError: as the block does.
    """
    try:
        yield
    except UsageError as error:
        for begin, whole in _IN_FOLDER.items():
            if error.message.startswith(begin):
                rest = error.message.removeprefix(begin)
                raise UsageError(whole.format(folder=folder) + rest, error.hint) from error
        raise


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in mlx-lm's source that is part of a traceback."""

    file: str
    line: int
    statement: ast.stmt | None
    expression: str
    frame: FrameType

    def __str__(self) -> str:
        return f"{Path(self.file).name}, line {self.line}"


def explain_failure(error: BaseException, config: Mapping[str, Any]) -> str:
    """Explain why a model's code raised ``error``, as the end of a sentence.

    Args:
        error: the caught error with its traceback.
        config: the config.json from which the model was built.
    """
    message = " ".join(str(error).split())
    if message.startswith("[metal_kernel]"):
        return (
            "it computes with kernels that exist for Metal alone, which this machine's MLX does "
            "not have; plan and run it on a Mac"
        )
    if message.startswith("[metal::load_device]"):
        return "macOS gives this session no GPU; sandboxes and most virtual machines have none"
    places = list(_places(error.__traceback__))
    if (missing := _MISSING.search(message)) is not None and isinstance(error, TypeError):
        return _lacking(re.findall(r"'(\w+)'", missing[1]), error.__traceback__, config)
    if (uneven := _UNEVEN.search(message)) is not None:
        return _not_divided(uneven, config)
    last = places[-1] if places else None
    if last is not None and _is_innermost(last, error.__traceback__):
        if isinstance(last.statement, ast.Raise) and message:
            return f'mlx-lm says "{_shortened(message)}"'
        if isinstance(last.statement, ast.Assert):
            if message:
                return f'mlx-lm says "{_shortened(message)}"'
            return f"mlx-lm requires {ast.unparse(last.statement.test)}"
    entry = _NO_ENTRY.fullmatch(message)
    for place in reversed(places):
        if fields := _fields_at(place, config):
            return f"mlx-lm's code cannot use {fields} ({place})"
        if entry is not None:
            return f"mlx-lm's code looks for {entry[1]} in a list without it ({place})"
    where = f" at {last}" if last is not None else ""
    return f"mlx-lm's own code fails{where}, for a reason that config.json does not show"


def _places(trace: TracebackType | None) -> Iterator[_Place]:
    """Yield the frames of a traceback that are in mlx-lm's model files, outermost first."""
    while trace is not None:
        code, line = trace.tb_frame.f_code, trace.tb_lineno
        if Path(code.co_filename).parts[-3:-1] == _MODELS:
            positions = list(code.co_positions())[trace.tb_lasti // 2]
            yield _Place(
                code.co_filename,
                line,
                _statement(code.co_filename, line),
                _segment(code.co_filename, positions),
                trace.tb_frame,
            )
        trace = trace.tb_next


def _statement(file: str, line: int) -> ast.stmt | None:
    """Return the innermost statement that a line of a file belongs to."""
    found: ast.stmt | None = None
    for node in ast.walk(ast.parse("".join(linecache.getlines(file)))):
        if not isinstance(node, ast.stmt):
            continue
        if node.lineno <= line <= (node.end_lineno or node.lineno):
            found = node if found is None or node.lineno >= found.lineno else found
    return found


def _segment(file: str, positions: tuple[int | None, int | None, int | None, int | None]) -> str:
    """Return the source of the expression that was being computed."""
    first, last, start, end = positions
    if first is None or last is None or start is None or end is None:
        return ""
    lines = linecache.getlines(file)[first - 1 : last]
    if not lines:
        return ""
    lines[-1] = lines[-1].encode()[:end].decode(errors="replace")
    lines[0] = lines[0].encode()[start:].decode(errors="replace")
    return "".join(lines)


def _is_innermost(place: _Place, trace: TracebackType | None) -> bool:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame is place.frame


def _lacking(names: list[str], trace: TracebackType | None, config: Mapping[str, Any]) -> str:
    """Name the fields that an architecture requires and the config does not have."""
    nested = ""
    while trace is not None:
        params = trace.tb_frame.f_locals.get("params")
        for name, value in config.items():
            if isinstance(value, Mapping) and params is not None and params == value:
                nested = f"{name} in "
        trace = trace.tb_next
    return f"{nested}config.json lacks {_listed(names)}"


def _not_divided(uneven: re.Match[str], config: Mapping[str, Any]) -> str:
    """Describe a matrix that does not divide, if possible by the config's field of that size."""
    ranks, axis, shape = uneven[1], int(uneven[2]), [int(each) for each in uneven[3].split(",")]
    side = shape[axis]
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        for name, value in fields.items():
            if value == side and isinstance(value, int) and not isinstance(value, bool):
                return f"{name} is {side}, which {ranks} ranks cannot share equally"
    return (
        f"a matrix of {' x '.join(map(str, shape))} has a side of {side}, which {ranks} ranks "
        "cannot share equally"
    )


def _fields_at(place: _Place, config: Mapping[str, Any]) -> str:
    """List the config's fields that the failing expression reads, with their values."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else {}
    sources = (config, text)
    found = []
    read = re.findall(r"\b(?:args|config)\.(\w+)", place.expression)
    taken = [name for name in re.findall(r"\w+", place.expression) if name in {**text, **config}]
    for name in dict.fromkeys(read or taken):
        if name in _HOLDERS:
            continue
        value = next((each[name] for each in sources if name in each), _ABSENT)
        if value is _ABSENT:
            found.append(f"a config.json without {name}")
        else:
            found.append(f"the {name} of config.json, {_shortened(json.dumps(value), 60)}")
    return " and ".join(found)


_ABSENT = object()


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _shortened(text: str, longest: int = _LONGEST_QUOTE) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
