"""Command ``k2 launch``: start a model on one or more nodes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.choices import REASONING_PARSERS, TOOL_PARSERS, Speculation
from k2cli.commands import options

if TYPE_CHECKING:
    from k2cli.commands.run_start import Following
    from k2cli.launch.request import LaunchRequest
    from k2cli.protocol import RunEvent
    from k2cli.runs.record import RunRecord


_DISK_OPTION = "--prefix-cache-disk"
DISK_VARIABLE = "K2_PREFIX_CACHE_DISK"
_LEAST_DISK_BYTES = 10**6
"""A number without its unit would else remove the caches of all models."""


class Restart(StrEnum):
    """Reaction to a failure of the run."""

    never = "never"
    on_failure = "on-failure"


def launch(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, Hub repository, folder or .gguf file.")
    ],
    nodes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Node of each rank, rank 0 first; a name may repeat. Default: localhost.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of a cluster made by k2 cluster init."),
    ] = None,
    transport: options.Transport = "auto",
    parallel: options.Parallel = "auto",
    dtype: options.FloatType = "auto",
    context: options.Context = None,
    concurrency: options.Concurrency = None,
    head: options.Head = "auto",
    prompt_tokens: options.PromptTokens = None,
    answer_tokens: options.AnswerTokens = None,
    kv_bits: options.KvBits = None,
    host: Annotated[str, typer.Option(help="Address that the API listens on.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of the API. Default: 8080 or the next free one."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="K2_API_KEY",
            help="Key that clients must send. Other users can see command lines, so it is safer to "
            "set K2_API_KEY.",
        ),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Keys made by k2 keys create that the API accepts: names, all or none. "
            "Default: all if --host is not of this machine alone, else none.",
        ),
    ] = None,
    share_prefixes: Annotated[
        bool,
        typer.Option(
            "--share-prefixes",
            help="Let all keys use one prefix cache. Prompts that others have sent before are then "
            "answered sooner, which tells a user that they have been sent.",
        ),
    ] = False,
    prefix_cache_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            envvar=DISK_VARIABLE,
            help="Keep the caches of prompts on the disks of the nodes too, in up to SIZE per rank "
            "(such as 50GB), so that a later run need not compute them again. Texts could be "
            "recovered from them. Default: nothing is kept on disks.",
        ),
    ] = None,
    no_prefix_cache_disk: Annotated[
        bool,
        typer.Option(
            "--no-prefix-cache-disk",
            help="Keep no caches on disks, even if K2_PREFIX_CACHE_DISK is set.",
        ),
    ] = False,
    tls_cert: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Certificate (PEM) to serve HTTPS with, on the first node."
        ),
    ] = None,
    tls_key: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Private key of --tls-cert, without password."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name by which clients reach the API, for a run without a key. Repeatable.",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin of web pages that may use the API, such as https://chat.example. "
            "Repeatable.",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Further model name that requests may use, for clients that insist on one. "
            "Repeatable.",
        ),
    ] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Form in which the model writes tool calls; none leaves them in the text. "
            f"Default: that of its chat template. Names: {', '.join(TOOL_PARSERS)}.",
        ),
    ] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Form in which the model marks its reasoning; none leaves it in the text. "
            f"Default: that of its chat template. Names: {', '.join(REASONING_PARSERS)}.",
        ),
    ] = None,
    speculation: Annotated[
        Speculation,
        typer.Option(
            help="Guess the next tokens of an answer from what it and its prompt repeat, and "
            "verify them in one step. auto: where that is measured to be faster.",
        ),
    ] = "auto",
    no_prompt_normalization: Annotated[
        bool,
        typer.Option(
            "--no-prompt-normalization",
            help="Keep Claude Code's billing header, which makes every prompt a new one.",
        ),
    ] = False,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan saved by plan-memory --save.")
    ] = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", "-d", help="Leave the run in the background once it is ready."),
    ] = False,
    restart: Annotated[
        Restart,
        typer.Option(help="on-failure: start again; give up after three failures in a row."),
    ] = Restart.never,
    wait: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Time to wait for nodes used by other runs."),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Share nodes with other runs, if all fit in memory.")
    ] = False,
    fast_synch: Annotated[
        bool,
        typer.Option(
            "--fast-synch",
            help="Set MLX_METAL_FAST_SYNCH: faster on Macs, but GPUs have hung with it.",
        ),
    ] = False,
    joined_projections: Annotated[
        bool | None,
        typer.Option(
            "--joined-projections/--no-joined-projections",
            help="Compute two matrices of each layer (gate and up) as one. Default: on GPUs, where "
            "it is faster.",
        ),
    ] = None,
    fetch: Annotated[
        bool,
        typer.Option(
            "--fetch", help="Bring each node the weights that its ranks read, if it lacks some."
        ),
    ] = False,
    link_check: options.LinkCheck = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Launch even if the plan does not fit or a check fails.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the run as JSON once it is ready.")
    ] = False,
) -> None:
    """Start a model on one or more nodes and serve it over an OpenAI-compatible API.

    Stays in the foreground, where Ctrl-C stops the run, unless --detach is given. Exits with 3
    if the plan does not fit, and with 5 if a node or a rank fails.

    Example: k2 launch demo --nodes localhost,localhost --parallel pipeline --detach
    """
    from k2cli.access.keys import parse_choice
    from k2cli.launch.request import LaunchRequest
    from k2cli.launch.restart_policy import RestartPolicy

    request = LaunchRequest(
        model=model,
        nodes=tuple(name.strip() for name in nodes.split(",")) if nodes is not None else None,
        transport=transport,
        parallel=parallel,
        dtype=dtype,
        head=head,
        context_length=context,
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        kv_bits=kv_bits or 0,
        host=host,
        port=port,
        api_key=api_key,
        keys=parse_choice(keys) if keys is not None else None,
        shares_prefixes=share_prefixes,
        prefix_disk_bytes=disk_bytes(None if no_prefix_cache_disk else prefix_cache_disk),
        tls_certificate=tls_cert,
        tls_key=tls_key,
        allowed_hosts=tuple(allow_host or ()),
        cors_origins=tuple(cors or ()),
        aliases=tuple(alias or ()),
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        normalizes_prompts=not no_prompt_normalization,
        speculation=speculation,
        plan_file=plan,
        force=force,
        cluster=cluster,
        restart=RestartPolicy(mode=restart.value),
        wait_seconds=_checked_wait(wait),
        share=share,
        fast_synch=fast_synch,
        joins_projections=joined_projections,
        fetch=fetch,
        link_check=link_check,
    )
    _launch(request, detach=detach, as_json=json)


def disk_bytes(size: str | None) -> int:
    """Return the limit of the prefix cache on disk, 0 for none.

    Args:
        size: that of the option or of the environment, None if there is none.

    Raises:
        UsageError: if it is not a size, or so small that its unit was forgotten.
    """
    import os

    from k2cli.errors import UsageError
    from k2cli.units import one_line, parse_bytes

    if size is None:
        return 0
    named = os.environ.get(DISK_VARIABLE) == size
    source = DISK_VARIABLE if named else _DISK_OPTION
    try:
        count = parse_bytes(size)
    except UsageError:
        count = -1
    if count == 0:
        hint = f"unset {DISK_VARIABLE}" if named else f"leave out {_DISK_OPTION}"
    else:
        meant = f"{count}GB" if size.strip().isdecimal() and count < 2**20 else "50GB"
        hint = f"export {DISK_VARIABLE}={meant}" if named else f"{_DISK_OPTION} {meant}"
    if not _LEAST_DISK_BYTES <= count < 2**60:
        raise UsageError(f"{source} '{one_line(size)}' is not a size of 1 MB or more", hint)
    return count


def _checked_wait(seconds: float | None) -> float:
    from k2cli.errors import UsageError

    if seconds is not None and not seconds > 0:
        raise UsageError(f"--wait {seconds:g} is not a positive number of seconds", "--wait 600")
    return seconds or 0.0


def _launch(request: LaunchRequest, *, detach: bool, as_json: bool) -> None:
    from k2cli.commands.run_start import Following, prepare, show_plan
    from k2cli.supervisor.start import cleanup_on_error
    from k2cli.ui.output import note

    run = prepare(request)
    with cleanup_on_error(run.record, note):
        show_plan(run)
        with Following(run.record, log=not detach) as following:
            if detach:
                _detach(run.record, following, as_json=as_json)
            else:
                _stay(run.record, following, as_json=as_json)


def _detach(prepared: RunRecord, following: Following, *, as_json: bool) -> None:
    from k2cli.supervisor.start import launch_detached
    from k2cli.ui.output import note
    from k2cli.units import one_line

    record = launch_detached(prepared, following.show, following.interrupted)
    if as_json:
        _print_ready(record)
    page = one_line(f"open {record.url}/ in a browser")
    note(f"\nnext: k2 chat, or {page}")
    note(f"      k2 logs -f {record.run_id}\n      k2 stop {record.run_id}")


def _stay(prepared: RunRecord, following: Following, *, as_json: bool) -> None:
    from k2cli.protocol import RunReady
    from k2cli.runs.record import read_record
    from k2cli.supervisor.start import launch_here
    from k2cli.ui.output import note, warn
    from k2cli.units import one_line

    interrupted = False

    def on_event(event: RunEvent) -> None:
        following.show(event)
        if isinstance(event, RunReady):
            note("\nnext: k2 chat   (in another terminal; Ctrl-C here stops the run)")
            note(f"      or open {one_line(event.url)}/ in a browser\n")
            if as_json and (record := read_record(prepared.folder)) is not None:
                _print_ready(record)

    def on_interrupt(first: bool) -> None:
        nonlocal interrupted
        interrupted = True
        following.interrupted(first)

    record = launch_here(prepared, on_event, on_interrupt)
    note(f"{record.run_id} {record.state}")
    for name, problem in record.left.items():
        warn(f"on {name}: {problem}; to clean up: k2 cluster clean --nodes {name}")
    if interrupted:
        raise KeyboardInterrupt


def _print_ready(record: RunRecord) -> None:
    from k2cli.ui.output import print_json

    print_json(
        {
            "schema_version": record.schema_version,
            "run_id": record.run_id,
            "model": record.model_name,
            "url": record.url,
            "pid": record.pid,
            "ranks": record.ranks,
            "backend": record.backend,
            "settings": record.settings,
            "log": str(record.log_file),
        }
    )
