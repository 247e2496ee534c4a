"""Compile one schema in a process of its own, and measure its time and memory."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from k2cli.grammars.check import grammar_problem
from k2cli.grammars.text import GrammarText
from k2cli.server.errors import ApiError
from k2cli.server.structured.json_schema import checked_schema

LIMIT_SECONDS = 60
PLACE = "schema"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a schema.

    Attributes:
        refusal: the server's words for a schema that it does not hold; None if it compiles.
        failure: how the process ended if it did not end by itself: a fault.
        seconds: time for reading and compiling.
        mebibytes: memory that this took beyond what the process had.
    """

    refusal: str | None = None
    failure: str | None = None
    seconds: float = 0.0
    mebibytes: float = 0.0


def grammar_of(schema: Any) -> str:
    """Return the grammar of a schema as the server makes it.

    Raises:
        ApiError: if the server refuses the schema.
    """
    text = GrammarText({})
    grammar = text.build(text.json(checked_schema(schema, PLACE)))
    if (problem := grammar_problem(grammar)) is not None:
        raise ApiError(400, problem)
    return grammar


def refusal_of(schema: Any) -> str | None:
    """Return why the server refuses a schema, or None."""
    try:
        grammar_of(schema)
    except ApiError as error:
        return error.message.removeprefix(PLACE)
    return None


def compiled(schema: Any) -> Outcome:
    """Compile a schema in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _compile(schema, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome(failure=signal.Signals(os.WTERMSIG(status)).name)
    return Outcome(**json.loads(data)) if data else Outcome(failure="it ended without a word")


def _compile(schema: Any, writing: int) -> None:
    signal.alarm(LIMIT_SECONDS)
    before, started = _resident_mebibytes(), time.perf_counter()
    try:
        refusal = refusal_of(schema)
        seconds = time.perf_counter() - started
        outcome = Outcome(
            refusal=refusal, seconds=seconds, mebibytes=max(0.0, _resident_mebibytes() - before)
        )
    except BaseException as error:
        outcome = Outcome(failure=f"{type(error).__name__}: {error}"[:200])
    os.write(writing, json.dumps(asdict(outcome)).encode())
    os._exit(0)


def _resident_mebibytes() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


_POINTER = re.compile(r"^(?:/.*?)?: ")
_OWN_WORDS = re.compile(
    r"""^.*(?= cannot be held; the formats)|(?<=the pattern ).*(?= cannot be held)"""
    r"""|^.*(?= is another document)|(?<=not supported: ).*|'[^']*'|"[^"]*"|/[^/\s]+/"""
    r"""|https?://\S+|\[[^\]]*\]"""
)


def group_of(refusal: str) -> str:
    """Return the words of a refusal without place, names and numbers."""
    words = _POINTER.sub("", refusal.splitlines()[0], count=1)
    return re.sub(r"\d+(?:\.\d+)?", "N", _OWN_WORDS.sub("…", words))[:160]
