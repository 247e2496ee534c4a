"""Hostile documents, made from valid ones: the generator of ``tests/hostile/test_generated_*.py``.

Every function takes a ``random.Random`` with a seed that is printed at a failure. A valid document
is changed at random places, so that a parser meets the hostile value deep inside, behind its first
checks.

``K2_GENERATED_CASES`` is the number of cases of each test in the long form, whose seeds are random.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from k2cli.errors import MAX_MESSAGE_LETTERS, InternalError, K2Error

LONG_FORM = int(os.environ.get("K2_GENERATED_CASES", "0"))
MOST_MESSAGE = MAX_MESSAGE_LETTERS + 10
CPU_SECONDS = 10.0
"""Processor time after which a parse counts as endless: a thousand times what a case takes."""

MEMORY_BYTES = 2**30
"""Memory that a parse of a small document may take in addition, on Linux."""

_DEEP = 100_000


class Raw(str):
    """JSON text that takes the place of a value, whatever ``json.dumps`` thinks of it."""


_WHOLE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1,
    2**63, -(2**63) - 1, 2**64 - 1, 2**64, 10**30, -(10**30), 10**400, 0.0, -0.0, 0.5, -1.5, 1e-320,
    1e-39, 1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "x", "0", "-1", "1e999", "²", "١٢", "9" * 5000, "x" * 70_000, "\0", "\n", "\x1b[31m",
    "\ud800", "a\udfffb", "\ufeff", "\u202e", "-oProxyCommand=x", "../../x", "/dev/zero", "a/b",
    "{{ 1 }}", "%s", "null", "e\u0301" * 50, "::1%x", "http://[", "1.2.3.4/99",
    [], {}, [[]], [{}], [None], {"": None}, {"a": {"b": {}}}, [0] * 3000, ["x"] * 100,
)  # fmt: skip
_RAW: tuple[Raw, ...] = tuple(map(Raw, (
    "[" * _DEEP + "]" * _DEEP, "[" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP,
    "[" * 900 + "]" * 900,
    "9" * 5000, "-" + "9" * 5000, "1e999", "-1e999", "1e-999", "0." + "0" * 5000 + "1", "01", "1.",
    "+1", "--1", "0x10", "NaN", "Infinity", "-Infinity", '"\\ud800"', '"\\udc00\\ud800"', '"\\u00"',
    '"\\x41"', '{"a":1,"a":2}', '{"a":1,}', "[1,]", "'a'", "", "nul", "True",
    '"' + "\\n" * 3000 + '"',
    '{"":""}', "{1:2}", '"\t"', "/**/1", "1 1",
)))  # fmt: skip
_NUMBERS = (
    "", "-1", "0", "1", "²", "١٢", "0x1", "1e9", "1.5", "+1", "1_0", str(2**31), str(2**63),
    str(2**64),
    "9" * 40, "9" * 5000, "nan", "inf",
)  # fmt: skip
_BYTES = (
    b"", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    b"\xc0\x80",
    b"\r\n", b"\n", b" " * 2000, b'"', b"\\", b"{", b"[", b"]", b"}", b",", b":", b"\x1b[2J",
    b"\x7f",
    b"[" * _DEEP, b'{"a":' * _DEEP, b"9" * 5000, b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f",
)  # fmt: skip


def hostile_value(draw: Random) -> Any:
    """Return a value that a careless parser does not expect; it may be ``Raw``."""
    return draw.choice(_RAW) if draw.random() < 0.3 else copy.deepcopy(draw.choice(_WHOLE))


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every node; of a long list, those of its first and last members."""
    yield path
    if isinstance(document, dict):
        for name, member in document.items():
            yield from _places(member, (*path, name))
    elif isinstance(document, list):
        indices = range(len(document))
        for index in indices if len(document) < 9 else (*indices[:4], *indices[-4:]):
            yield from _places(document[index], (*path, index))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        document = document[step]
    return document


def _change(document: Any, draw: Random) -> Any:
    """Make one change; returns the document, which is a new one if its root was replaced."""
    places = list(_places(document))
    path = draw.choice(places)
    if not path:
        if draw.random() < 0.8:  # the root alone is soon exhausted
            return document
        wrapped = [document, [document], {"a": document}, hostile_value(draw)]
        return draw.choice(wrapped)
    parent, name = _at(document, path[:-1]), path[-1]
    match draw.choice(("replace", "replace", "replace", "delete", "move", "nest", "add", "rename")):
        case "replace":
            parent[name] = hostile_value(draw)
        case "delete":
            del parent[name]
        case "move":
            parent[name] = copy.deepcopy(_at(document, draw.choice(places)))
        case "nest":
            parent[name] = draw.choice(([parent[name]], {"a": parent[name]}, [parent[name]] * 2))
        case "add" | "rename" if isinstance(parent, list):
            parent.insert(draw.randrange(len(parent) + 1), hostile_value(draw))
        case "add":
            parent[str(draw.choice((*_NUMBERS, "unknown", "\ud800", "__metadata__")))] = (
                hostile_value(draw)
            )
        case "rename":
            parent[str(draw.choice((*_NUMBERS, "type", "\0", "x" * 5000)))] = parent.pop(name)
    return document


def mutated(document: Any, draw: Random) -> Any:
    """Return a copy with one to four changes."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        document = _change(document, draw)
    return document


def plain(document: Any) -> Any:
    """Return a document whose ``Raw`` parts are ordinary strings, to encode as msgpack."""
    if isinstance(document, dict):
        return {plain(name): plain(member) for name, member in document.items()}
    if isinstance(document, list | tuple):
        return [plain(member) for member in document]
    return str(document) if isinstance(document, Raw) else document


def as_json(document: Any) -> bytes:
    """Encode a document with its ``Raw`` parts, huge integers and lone surrogates."""
    raws: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {name: marked(member) for name, member in value.items()}
        if isinstance(value, list | tuple):
            return [marked(member) for member in value]
        return value

    text = json.dumps(marked(document))
    return re.sub('"@raw([0-9]+)@"', lambda found: raws[int(found[1])], text).encode()


def damaged(data: bytes, draw: Random) -> bytes:
    """Cut bytes short, or change, remove, insert or repeat some of them."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        match draw.choice(("cut", "set", "remove", "insert", "insert", "repeat", "encode")):
            case "cut":
                data = data[:at]
            case "set":
                data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
            case "remove":
                data = data[:at] + data[at + draw.choice((1, 2, 8, 100)) :]
            case "insert":
                data = data[:at] + draw.choice(_BYTES) + data[at:]
            case "repeat":
                data = data[:at] + data[at : at + 50] * draw.choice((2, 20)) + data[at:]
            case "encode":
                name = draw.choice(("utf-16", "utf-32", "latin-1", "utf-7"))
                data = data.decode("latin-1").encode(name)
    return data


def mutated_json(document: Any, draw: Random) -> bytes:
    """Return the JSON of a changed document; one in five is damaged as bytes too."""
    data = as_json(mutated(document, draw) if draw.random() < 0.9 else document)
    return damaged(data, draw) if draw.random() < 0.2 else data


def mutated_text(text: str, draw: Random) -> str:
    """Change numbers, words and lines of a text."""
    for _ in range(draw.choice((1, 1, 2, 3, 5))):
        lines = text.split("\n")
        at = draw.randrange(len(lines))
        match draw.choice(("number", "number", "word", "line", "delete", "repeat", "move", "cut")):
            case "number":
                numbers = list(re.finditer(r"\d+", text))
                if numbers:
                    found = draw.choice(numbers)
                    text = text[: found.start()] + draw.choice(_NUMBERS) + text[found.end() :]
                continue
            case "word":
                words = lines[at].split(" ")
                words[draw.randrange(len(words))] = str(
                    draw.choice((*_NUMBERS, ":", "=", "\0", "x"))
                )
                lines[at] = " ".join(words)
            case "line":
                lines[at] = draw.choice(
                    ("", ":", "=", " | ", "{", "²", "\ud800", "x" * 70_000, "\t:\t")
                )
            case "delete":
                del lines[at]
            case "repeat":
                lines[at:at] = [lines[at]] * draw.choice((1, 200))
            case "move":
                lines.insert(draw.randrange(len(lines)), lines.pop(at))
            case "cut":
                lines = [*lines[:at], lines[at][: draw.randrange(len(lines[at]) + 1)]]
        text = "\n".join(lines)
        if not text:
            break
    return text


# --- running -------------------------------------------------------------------------------------

Test = Callable[..., None]
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def generated(count: int) -> Callable[[Test], Test]:
    """Run a test with ``count`` generators named ``draw``; with the same ones each time in CI.

    Hypothesis draws their seeds, and prints that of a failure. It does not draw the choices
    themselves: it prefers simple ones, and half of the documents would be drawn twice.
    """

    def decorate(test: Test) -> Test:
        names = [name for name in inspect.signature(test).parameters if name != "draw"]

        def seeded(seed: int, **fixtures: Any) -> None:
            test(draw=Random(seed), **fixtures)

        seeded.__name__, seeded.__doc__ = test.__name__, test.__doc__
        parameters = [inspect.Parameter(name, _KEYWORD) for name in ("seed", *names)]
        seeded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        whole: Test = settings(
            max_examples=LONG_FORM or count,
            derandomize=not LONG_FORM,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # a smaller seed is not a smaller document
            suppress_health_check=list(HealthCheck),
        )(given(seed=st.integers(0, 2**64 - 1))(seeded))
        return whole

    return decorate


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise an error in what takes 10 s of the processor or 1 GiB."""

    endless: list[str] = []

    def over(*_: object) -> None:
        endless.append(f"it took more than {CPU_SECONDS:.0f} s of the processor")
        raise AssertionError(endless[0])

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        with _bounded_memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert not endless, endless[0]  # what was interrupted may have caught the error


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    with open("/proc/self/status", encoding="ascii") as status:
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def reads_or_refuses(parse: Callable[[], Any], name: str = "", *errors: type[Exception]) -> Any:
    """Check that a parse gives a value or one of its documented errors (K2Error by default).

    Args:
        parse: reads the document.
        name: of the file or node, which the message must contain.
        errors: documented errors that are no K2Error.

    Returns:
        The value; None if it was refused.
    """
    with bounded():
        try:
            return parse()
        except K2Error as error:
            refused = error
        except errors:
            return None
    assert not isinstance(refused, InternalError)
    assert name in refused.message
    assert len(refused.message) < MOST_MESSAGE
    return None
