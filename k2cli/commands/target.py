"""Choice of the server for a client command: the one of ``--url``, or a run of this machine."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.errors import ClusterError, K2Error, UsageError
from k2cli.files import is_same_path, read_regular

if TYPE_CHECKING:
    from k2cli.runs.record import RunRecord

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Name of the model. Default: the model of the run."),
]
UrlOption = Annotated[
    str | None, typer.Option(help="Server, such as http://127.0.0.1:8080. Default: the live run.")
]
ApiKeyOption = Annotated[
    str | None, typer.Option(envvar="K2_API_KEY", help="API key, if the server requires one.")
]
_MAX_KEY_BYTES = 4096
_LAUNCH_HINT = "k2 launch demo --detach"


@dataclass(frozen=True, slots=True)
class Target:
    """A server, its API key and its model; ``run`` is None for a server given by its URL.

    ``certificate`` is the file with the one certificate to trust, None for those of the system.
    """

    url: str
    api_key: str | None
    model: str | None
    run: RunRecord | None = None
    certificate: Path | None = None


def resolve_target(model: str | None, url: str | None, api_key: str | None) -> Target:
    """Return the server at a URL, or else the live run that serves the model.

    Raises:
        K2Error: if no run is live, if none serves the model, or if the run is not ready yet.
    """
    if url is not None:
        return Target(url, api_key, model)
    return target_of(run_serving(model), api_key)


def target_of(run: RunRecord, api_key: str | None) -> Target:
    """Return the server of a run.

    Raises:
        ClusterError: if it is not ready yet.
        K2Error: if its key cannot be read.
    """
    if run.state != "ready":
        raise ClusterError(f"run {run.run_id} is {run.state}, not ready", "k2 ps")
    key = api_key or key_of(run)
    return Target(run.url, key, run.model_name, run, run.certificate_file)


def resolve_run(name: str | None) -> RunRecord:
    """Return the live run of a name, or the only live run; it is ready.

    Raises:
        UsageError: if no name is given and several runs are live.
        K2Error: if no run is live, if none has the name, or if the run is not ready yet.
    """
    from k2cli.runs.record import list_runs

    if name is None:
        live = [run for run in list_runs() if run.live]
        if len(live) > 1:
            runs = ", ".join(f"{run.run_id} ({run.model_name})" for run in live)
            raise UsageError(f"{len(live)} runs are live: {runs}", f"--run {live[0].run_id}")
    run = run_serving(name)
    if run.state != "ready":
        raise ClusterError(f"run {run.run_id} is {run.state}, not ready", "k2 ps")
    return run


def run_serving(model: str | None) -> RunRecord:
    """Return the live run that serves a model, or the newest one if the model is None.

    Raises:
        K2Error: if there is none.
    """
    from k2cli.runs.record import find_run, list_runs

    try:
        newest = find_run()
    except K2Error as error:
        raise type(error)(error.message, _LAUNCH_HINT) from error
    if model is None:
        return newest
    live = [run for run in list_runs() if run.live]
    for run in live:
        if model in (run.model, run.model_name, run.run_id) or _same_folder(model, run.model):
            return run
    serving = ", ".join(sorted({run.model_name for run in live}))
    message = f"no live run serves '{model}'; live runs serve {serving}"
    raise K2Error(message, _launch_of(model) or f"a name of a run, such as {live[0].model_name}")


def _launch_of(model: str) -> str | None:
    """Return the command that starts a model; None if k2 knows none of that name."""
    from k2cli.models.reference import parse_reference

    try:
        parse_reference(model)
    except K2Error:
        return None
    return f"k2 launch {shlex.quote(model)} --detach"


def _same_folder(one: str, other: str) -> bool:
    return os.path.exists(one) and is_same_path(one, other)


def key_of(run: RunRecord) -> str | None:
    path = run.api_key_file
    if path is None:
        return None
    try:
        return read_regular(path, _MAX_KEY_BYTES).decode().strip()
    except FileNotFoundError:  # the run is ending: what is asked of it says so
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise K2Error(
            f"the API key in {path} cannot be read: {error}",
            "export K2_API_KEY=KEY, with the key in that file",
        ) from error
