"""Command ``k2 connect``: point coding agents of others at a run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.commands.options import AsJson

if TYPE_CHECKING:
    from k2cli.commands.target import Target
    from k2cli.connect.endpoint import Endpoint, Key
    from k2cli.connect.settings import Agent, Settings
    from k2cli.connect.shells import Shell

_MAX_KEY_BYTES = 4096


def connect(
    agent: Annotated[
        str,
        typer.Argument(
            metavar="AGENT",
            help="claude, codex, opencode, aider, cline, continue, zed, or env for variables "
            "alone.",
        ),
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="Run this with the environment of the run."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run, by its id or its model. Default: the live run, if there is only one.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Server of another machine, such as http://studio-1:8080."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the model, such as one of launch --alias."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the key to use. Default: K2_API_KEY, or else the run's own key.",
        ),
    ] = None,
    shell: Annotated[
        str | None,
        typer.Option(
            metavar="SHELL",
            help="Syntax of printed variables: sh, fish or powershell. Default: that of SHELL.",
        ),
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Change the agent's configuration; show the difference and ask first."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --write: do not ask.")] = False,
    show_key: Annotated[
        bool,
        typer.Option(
            "--show-key", help="Print the key and nothing else, for programs that ask for it."
        ),
    ] = False,
    json: AsJson = False,
) -> None:
    """Print what points a coding agent at a run, write it to its configuration, or run it so.

    Without options, the settings are printed: address, model, limits, and how to read the key.
    With --write, the agent's own configuration is changed, and a copy of the old one is kept. With
    a command after --, that command runs with the settings in its environment; nothing is left.

    Example: k2 connect claude

    Example: k2 connect codex --write

    Example: k2 connect claude -- claude

    Example: eval "$(k2 connect env)"
    """
    from k2cli.connect.registry import agent_named

    found = agent_named(agent)
    _check_options(found, command or [], write=write, yes=yes, show_key=show_key, json=json)
    syntax = _shell(shell)
    target = _target(run, url)
    key = _key(target, run, key_file)
    if show_key:
        _print_key(key)
        return
    endpoint = _endpoint(target, model, key)
    settings = found.settings(endpoint)
    if command:
        _run(found, settings, endpoint, command)
    elif write:
        _write(found, settings, endpoint, target, yes=yes, json=json, syntax=syntax)
    else:
        options = {"--run": run, "--url": url, "--model": model, "--key-file": key_file}
        _show(found, endpoint, target, _again(found, options), json=json, syntax=syntax)


def _check_options(
    agent: Agent, command: list[str], *, write: bool, yes: bool, show_key: bool, json: bool
) -> None:
    from k2cli.errors import UsageError

    given = {"a command": bool(command), "--write": write, "--show-key": show_key}
    modes = [name for name, wanted in given.items() if wanted]
    if len(modes) > 1:
        raise UsageError(f"{modes[0]} and {modes[1]} exclude each other", f"leave out {modes[1]}")
    if json and (command or show_key):
        raise UsageError(f"--json and {modes[0]} exclude each other", "leave out --json")
    if yes and not write:
        raise UsageError("--yes is for --write", f"k2 connect {agent.name} --write --yes")
    if write and agent.name == "env":
        raise UsageError(
            "variables of the environment have no configuration file",
            'put this into the profile of your shell: eval "$(k2 connect env)"',
        )


def _shell(name: str | None) -> Shell:
    from k2cli.connect.shells import SHELLS, shell_of
    from k2cli.errors import UsageError

    if name is None:
        return shell_of(os.environ.get("SHELL", ""))
    for shell in SHELLS:
        if name == shell:
            return shell
    raise UsageError(f"--shell '{name}' is not one of {', '.join(SHELLS)}", "--shell sh")


def _target(name: str | None, url: str | None) -> Target:
    from k2cli.commands.target import Target, resolve_run
    from k2cli.errors import UsageError

    if url is not None:
        if name is not None:
            raise UsageError("--run and --url exclude each other", "leave out --url")
        if "@" in url.partition("//")[2].partition("/")[0]:
            # It would be printed, and written where others may read it.
            raise UsageError(
                "--url has a user name or a password, which an address must not have",
                "k2 connect AGENT --url http://HOST:PORT --key-file FILE",
            )
        return Target(url, None, None)
    run = resolve_run(name)
    return Target(run.url, None, run.model_name, run, run.certificate_file)


def _key(target: Target, run: str | None, key_file: Path | None) -> Key | None:
    """Return the key to use; None if the run asks for none, or no key is known.

    Raises:
        K2Error: if the file with the key cannot be read.
    """
    from k2cli.commands.target import key_of
    from k2cli.connect.endpoint import KEY_VARIABLE, Key
    from k2cli.settings import expand_home

    own = key_of(target.run) if target.run is not None else None
    if target.run is not None and own is None:
        return None  # whatever the environment has, this run does not want it
    if key_file is not None:
        path = expand_home(str(key_file)).absolute()
        return Key(_read_key(path), ("cat", str(path)))
    if given := os.environ.get(KEY_VARIABLE):
        return Key(given.strip(), ("printenv", KEY_VARIABLE))
    if own is None:
        return None
    of_run = () if run is None else ("--run", run)
    return Key(own, (*_k2(), "connect", "env", "--show-key", *of_run))


def _read_key(path: Path) -> str:
    from k2cli.errors import K2Error
    from k2cli.files import read_regular

    try:
        key = read_regular(path, _MAX_KEY_BYTES, follow_links=True).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise K2Error(f"the key in '{path}' cannot be read: {reason}") from error
    if not key or not key.isprintable() or " " in key:
        raise K2Error(f"'{path}' does not hold a key alone", f"k2 keys create NAME > {path}")
    return key


def _k2() -> tuple[str, ...]:
    """Return the command that starts this k2, also from a program with another PATH."""
    import shutil

    beside = Path(sys.executable).with_name("k2")
    found = shutil.which("k2")
    if found is not None and Path(found).resolve() == beside.resolve():
        return (found,)
    return (str(beside),) if beside.is_file() else (sys.executable, "-m", "k2cli")


def _print_key(key: Key | None) -> None:
    from k2cli.connect.endpoint import PLACEHOLDER_KEY
    from k2cli.ui.output import note, print_text

    if key is None:
        note("the run asks for no key; this placeholder is for programs that want one")
    print_text(PLACEHOLDER_KEY if key is None else key.value)


def _endpoint(target: Target, model: str | None, key: Key | None) -> Endpoint:
    from k2cli.client.client import ApiClient
    from k2cli.connect.endpoint import Endpoint, checked_model_name

    value = None if key is None else key.value
    with ApiClient(target.url, value, target.certificate) as client:
        picked = client.pick_model(model or target.model)
        base = client.base
    return Endpoint(
        url=base.removesuffix("/v1"),
        model=checked_model_name(picked.name),
        context_tokens=picked.context_length,
        tools=picked.tools is not False,
        reasoning=picked.reasoning is True,
        key=key,
        authority=_authority(base, target.certificate),
    )


def _authority(base: str, certificate: Path | None) -> Path | None:
    from k2cli.connect.authority import authority_of
    from k2cli.ui.output import warn

    if not base.startswith("https:"):
        return None
    found = authority_of(certificate, os.environ)
    if found is None and certificate is not None:
        warn(
            "the certificate of the run was issued by an authority; if the system does not know "
            "that one, name its file: SSL_CERT_FILE=ca.pem k2 connect ..."
        )
    return found


def _run(agent: Agent, settings: Settings, endpoint: Endpoint, command: list[str]) -> None:
    from k2cli.connect.execute import run_agent
    from k2cli.ui.output import warn

    if not agent.environment_suffices:
        warn(
            f"{agent.title} takes its server from its configuration alone: "
            f"k2 connect {agent.name} --write sets it"
        )
    run_agent(agent, settings, endpoint, command, os.environ)


def _again(agent: Agent, options: Mapping[str, object]) -> str:
    """Return the command line with the options that were given."""
    given = [word for name, value in options.items() if value for word in (name, str(value))]
    return shlex.join(["k2", "connect", agent.name, *given])


def _show(
    agent: Agent, endpoint: Endpoint, target: Target, again: str, *, json: bool, syntax: Shell
) -> None:
    from k2cli.connect.describe import describe
    from k2cli.ui.connect_view import print_settings
    from k2cli.ui.output import print_json

    described = describe(agent, endpoint, syntax)
    run_id = None if target.run is None else target.run.run_id
    if json:
        print_json(described.document(run_id))
    else:
        print_settings(described, run_id, again)


def _write(
    agent: Agent,
    settings: Settings,
    endpoint: Endpoint,
    target: Target,
    *,
    yes: bool,
    json: bool,
    syntax: Shell,
) -> None:
    from k2cli.connect.config_file import plan_change, write_change
    from k2cli.connect.describe import describe
    from k2cli.ui.connect_view import print_change, print_notes, print_start, print_written
    from k2cli.ui.output import note, print_json

    secret = None if endpoint.key is None else endpoint.key.value
    planned = [plan_change(change) for change in settings.files]
    changes = [each for each in planned if each.changes]
    differences = {each.path: each.difference(secret) for each in changes}
    for each in planned:
        if not each.changes:
            note(f"{each.path} says all this already")
        elif not json:
            print_change(each, differences[each.path])
    if changes:
        _confirm(yes=yes)
    written = []
    for each in changes:
        done = write_change(each)
        written.append(
            {
                "path": str(done.path),
                "copy": None if done.copy is None else str(done.copy),
                "undo": done.undo,
                "difference": differences[each.path],
            }
        )
        print_written(done)
    described = describe(agent, endpoint, syntax)
    if json:
        run_id = None if target.run is None else target.run.run_id
        print_json({**described.document(run_id), "written": written})
    print_start(described)
    print_notes(described)


def _confirm(*, yes: bool) -> None:
    """Ask if the files are to be changed.

    Raises:
        UsageError: if there is no terminal to ask on.
        K2Error: if the answer is no.
    """
    from k2cli.errors import K2Error, UsageError
    from k2cli.ui.output import note

    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("without a terminal to ask on, nothing is changed", "--yes")
    note("change this? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise K2Error("nothing was changed")
