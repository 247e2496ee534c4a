"""Hints for lines that the parser refuses: commands to copy, which the parser accepts."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from k2cli.cli import build_app, run_command_line
from k2cli.errors import UsageError

LINES = {
    "cache clear demo": "k2 cache clear --model demo",
    "cache clear 'my model' --yes": "k2 cache clear --model 'my model'",
    "cache list demo": "k2 cache list",
    "cache show demo": "k2 cache list",
    "cache remove demo": "k2 cache clear --model demo",
    "cache rm --yes": "k2 cache clear --yes",
    "models prune demo": "k2 models remove demo",
    "models list demo": "k2 models show demo",
    "models lst --json": "k2 models list --json",
    "models remove": "k2 models list",
    "keys rm alice": "k2 keys revoke alice",
    "lanch demo --detach": "k2 launch demo --detach",
    "launch demo --node a,b": "k2 launch demo --nodes a,b",
    "launch demo --node=a,b": "k2 launch demo --nodes=a,b",
    "launch demo studio-2 --detach": "k2 launch demo --detach",
    "launch demo --nodes a b --detach": "k2 launch demo --nodes a,b --detach",
    "launch --nodes a b demo": "k2 launch --nodes a,b demo",
    "launch demo --nodes a, b": "k2 launch demo --nodes a,b",
    "launch demo --ctx 4096": "k2 launch demo --context 4096",
    "launch demo --kv-cache-bits 8": "k2 launch demo --kv-bits 8",
    "launch demo --parallel diagonal -d": "k2 launch demo -d --parallel auto",
    "launch demo --port x -d": "k2 launch demo -d --port 8080",
    "launch --port x": "k2 launch MODEL --port 8080",
    "bench -r x -p 4": "k2 bench -p 4 --repetitions 5",
    "bench --json -p 4": "k2 bench -o json -p 4",
    "chat --model demo -p Hello": "k2 chat demo -p Hello",
    "stop --run=demo": "k2 stop demo",
    "plan-memory demo --nodes a,b,c --json": "k2 plan-memory demo --hardware '3x this' --json",
    "plan demo": "k2 plan-memory demo",
    "run demo -d": "k2 launch demo -d",
    "status --json": "k2 ps --json",
    "kill one": "k2 stop one",
    "stop one two --json": "k2 stop one --json",
    "ps --json=1": "k2 ps --json",
    "download": "k2 download demo",
    "launch demo extra --cluster extra": "k2 launch demo --cluster extra",
    "top --interval": "k2 top --interval 2",
    "launch demo --parallel": "k2 launch demo --parallel auto",
    # Lines with several errors.
    "ps --jsn=1": "k2 ps --json",
    "ps --jsn more": "k2 ps --json",
    "logss demo --folow more --json=1": "k2 logs demo --follow --json",
    "keys revoke --jsn": "k2 keys list",
    "keys rm": "k2 keys list",
    "top --intervall x": "k2 top --interval 2",
    "launch demo --detch --port": "k2 launch demo --detach --port 8080",
    "ps --jsn --interval": "k2 ps --help",
    "logss demo --nope": "k2 logs --help",
    "cache list -- --json": "k2 cache list --",
    "models list -- --nope": "k2 models show --help",
    "plan-memry demo --kv-bits '$(id)'": "k2 --help",
    # Nothing better is known, or a secret would be repeated.
    "clear": "k2 --help",
    "cache nonsense": "k2 cache --help",
    "launch demo --nope": "k2 launch --help",
    "launch demo more --api-key s3cret": "k2 launch --help",
    "top more --url http://me:s3cret@host extra": "k2 top --help",
    "launch demo --api-kye s3cret": "k2 launch --help",
    "launch demo --apikey=s3cret": "k2 launch --help",
    "launch demo --API_KEY s3cret": "k2 launch --help",
    "cache list -- --api-key s3cret": "k2 cache list --help",
    "ps more http://me:s3cret@host": "k2 ps --help",
    "lanch demo --api-kye=s3cret": "k2 --help",
}


@functools.cache
def _parser() -> Any:
    return typer.main.get_command(build_app())


def _refused(words: list[str]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        run_command_line(words)
    return caught.value


def _is_accepted(line: str) -> bool:
    """True if the parser accepts a line, or shows help for it; nothing is carried out."""
    name, *words = shlex.split(line, comments=True)
    assert name == "k2"
    command, context = _parser(), None
    while True:
        if "--help" in words[:1]:
            return True
        group = getattr(command, "commands", None)
        if group is None:
            command.make_context(name, list(words), parent=context)
            return True
        context = command.make_context(name, [words[0]], parent=context)
        name, *words = words
        command = group[name]


@pytest.mark.parametrize("line", LINES)
def test_a_refused_line_is_answered_with_one_that_is_accepted(line: str) -> None:
    error = _refused(shlex.split(line))
    assert error.hint == LINES[line]
    assert "s3cret" not in error.message
    if error.hint.startswith("k2 "):
        assert _is_accepted(error.hint)


@pytest.mark.parametrize(
    ("line", "message"),
    {
        "plan demo": "no such command 'plan'. Did you mean 'plan-memory'?",
        "nonsense": "no such command 'nonsense'",
        "chat --model demo": "no such option: --model",
        "launch demo --node a": "no such option: --node (Possible options: --nodes)",
        "launch demo --ctx 1": "no such option: --ctx (Possible options: --context)",
    }.items(),
)
def test_only_what_is_meant_is_offered(line: str, message: str) -> None:
    """The parser alone offers ``launch`` for ``plan``, and ``--help`` for ``--model``."""
    assert _refused(line.split()).message == message


def _commands() -> Iterator[tuple[list[str], Any]]:
    waiting: list[tuple[list[str], Any]] = [([], _parser())]
    while waiting:
        path, command = waiting.pop()
        group = getattr(command, "commands", None)
        if group is None:
            yield path, command
        else:
            waiting += [([*path, name], each) for name, each in group.items()]


def test_hints_for_an_argument_too_many_or_too_few_are_accepted() -> None:
    """Of every command, also of those to come."""
    tried = 0
    for path, command in _commands():
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        if any(each.required for each in arguments):
            hint = _refused(path).hint
            assert hint is not None
            assert "--help" not in hint
            assert _is_accepted(hint), hint
            tried += 1
        if all(each.nargs == 1 for each in arguments):
            hint = _refused([*path, *(f"word{n}" for n in range(len(arguments) + 1))]).hint
            assert hint is not None
            assert "--help" not in hint
            assert _is_accepted(hint), hint
            tried += 1
    assert tried > 30


def test_an_option_without_its_value_is_answered_with_the_line_and_a_value() -> None:
    """Of every command: the whole line where a value is known, else the kind of the value."""
    lines, kinds = [], []
    for path, command in _commands():
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        needed = ["demo" for each in arguments if each.required]
        for option in command.params:
            name = max(option.opts, key=len)
            has_default = (path, name) == (["chat"], "--resume")
            if option in arguments or getattr(option, "is_flag", False) or has_default:
                continue
            hint = _refused([*path, *needed, name]).hint
            assert hint is not None
            if hint.startswith("k2 ") and "--help" not in hint:
                assert hint.startswith(shlex.join(["k2", *path, *needed, name])), hint
                assert _is_accepted(hint), hint
                lines.append(hint)
            else:
                kinds.append((name, hint, option.metavar))
    assert len(lines) > 30
    for name, hint, kind in kinds:
        if str(kind).isupper():
            assert hint == f"{name} {kind}"
        else:
            assert hint.endswith(" --help")
