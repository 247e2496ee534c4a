"""Schemas, patterns and grammars that explode: refused in time, by a reader that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.hostile.test_http import QUESTION, Server, running


def chain(length: int, *, beside: bool = False) -> dict[str, Any]:
    more = {"maxProperties": 3} if beside else {}

    def link(number: int) -> dict[str, Any]:
        to = {"$ref": f"#/$defs/d{number + 1}", **more}
        return {"type": "object", "properties": {"l": to, "r": to}}

    names = {f"d{number}": link(number) for number in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{length}": {"type": "object"}}}


def patterns(letter: str) -> dict[str, Any]:
    return {"anyOf": [{"type": "string", "pattern": f"{letter}{number}"} for number in range(200)]}


def schema(value: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}
    return {"response_format": form}


def nested(levels: int) -> Any:
    return json.loads('{"items":' * levels + "{}" + "}" * levels)


def rules(count: int) -> str:
    lines = [f'r{number}: "a" r{number + 1} | "b" r{number + 1}' for number in range(count)]
    return "\n".join(("start: r0", *lines, f'r{count}: "c"'))


BOMBS: dict[str, dict[str, Any]] = {
    "nested": schema(nested(150)),
    "references in a row": schema(chain(1_500)),
    "references that double": schema(chain(40, beside=True)),
    "patterns of names": schema({"patternProperties": {f"^x{i}_": {} for i in range(1_000)}}),
    "products of patterns": schema({"allOf": [patterns("a"), patterns("b")]}),
    "products of unions": schema(
        {
            "allOf": [
                {"anyOf": [{"required": [f"{i}a"]}, {"required": [f"{i}b"]}]} for i in range(30)
            ]
        }
    ),
    "members": schema({"properties": {f"p{i}": {} for i in range(20_000)}}),
    "objects in an enum": schema({"enum": [{"a": [i, {"b": i}]} for i in range(10_000)]}),
    "rules in a row": {"grammar": rules(20_000)},
    "inline schema": {"grammar": f"start: %json {json.dumps(chain(40, beside=True))}"},
    "brackets": {"response_format": {"type": "regex", "regex": "(" * 60_000}},
    "rules of GBNF": {"grammar": "\n".join(f"r{i} ::= r{i + 1}" for i in range(5_000))},
}


@pytest.fixture(scope="module")
def server(toy_k2: Path) -> Iterator[Server]:
    with running(toy_k2) as server:
        yield server


def readers() -> set[int]:
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "k2cli.guard.reader_process" in process.cmdline()
    }


@pytest.mark.parametrize("name", BOMBS)
def test_what_explodes_is_refused_and_its_reader_goes_on(server: Server, name: str) -> None:
    server.answers()
    before = readers()
    response = server.post(QUESTION | BOMBS[name])
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, None), error
    assert error["param"].startswith(("response_format", "grammar")), error
    assert len(response.content) < 5000
    assert before <= readers()
    server.answers()
