"""Commands ``k2 keys ...``: give people keys of their own to the API, and take them back."""

from __future__ import annotations

from typing import Annotated

import typer

from k2cli.commands.options import AsJson

_HELP = "Give others a key of their own to your runs, with limits, and revoke it."
_MOST = 10**9

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the key, such as alice.")]

keys = typer.Typer(
    name="keys",
    help=_HELP,
    short_help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def create(
    name: KeyName,
    max_concurrent: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST, help="Requests of the key that are computed at a time; more wait."
        ),
    ] = None,
    max_queued: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_MOST,
            help="Requests that may wait because of --max-concurrent; more are refused. "
            "Default: 256.",
        ),
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST,
            help="Tokens of prompts and answers that are computed per minute; those from a cache "
            "do not count.",
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Time until the key expires, such as 30d or 12h."),
    ] = None,
    monitor: Annotated[
        bool,
        typer.Option(
            "--monitor", help="Let the key read /metrics and /v1/status, which show all keys' use."
        ),
    ] = False,
    json: AsJson = False,
) -> None:
    """Make a key and print it, once: k2 keeps only its digest.

    Runs that listen beyond this machine accept it at once, unless launched with other --keys.

    Example: k2 keys create alice --max-concurrent 2 --tokens-per-minute 60000 --expires 30d
    """
    from k2cli.access.key_file import SCHEMA_VERSION, create_key
    from k2cli.access.keys import parse_duration
    from k2cli.errors import UsageError
    from k2cli.protocol import KeyLimits
    from k2cli.ui.key_table import key_document
    from k2cli.ui.output import note, print_json, print_text

    if max_queued is not None and max_concurrent is None:
        raise UsageError(
            "--max-queued limits the requests that --max-concurrent keeps waiting, which is "
            "missing",
            f"--max-concurrent 1 --max-queued {max_queued}",
        )
    limits = KeyLimits(max_concurrent, max_queued, tokens_per_minute)
    seconds = parse_duration(expires) if expires is not None else None
    key, secret = create_key(name, limits, seconds, monitors=monitor)
    if json:
        document = {"schema_version": SCHEMA_VERSION, "key": key_document(key), "api_key": secret}
        print_json(document)
    else:
        print_text(secret)
    note(f"this key of {key.name} is not shown again; to take it back: k2 keys revoke {key.name}")


def list_(json: AsJson = False) -> None:
    """List the keys, with their limits and without the keys themselves.

    Example: k2 keys list
    """
    from k2cli.access.key_file import SCHEMA_VERSION, read_keys
    from k2cli.ui.key_table import key_document, print_keys
    from k2cli.ui.output import print_json

    found = read_keys()
    if json:
        listed = [key_document(key) for key in found]
        print_json({"schema_version": SCHEMA_VERSION, "keys": listed})
    else:
        print_keys(found)


def revoke(name: KeyName, json: AsJson = False) -> None:
    """Revoke a key. Runs refuse it within 5 seconds, and end the requests that it has there.

    Example: k2 keys revoke alice
    """
    from k2cli.access.key_file import SCHEMA_VERSION, revoke_key
    from k2cli.ui.key_table import key_document
    from k2cli.ui.output import note, print_json

    key = revoke_key(name)
    if json:
        print_json({"schema_version": SCHEMA_VERSION, "revoked": key_document(key)})
    note(f"revoked the key of {key.name}; runs refuse it within 5 s")


for _name, _command in (("create", create), ("list", list_), ("revoke", revoke)):
    # Given in full, because typer would cut off a long line in the list of commands.
    _short = " ".join((_command.__doc__ or "").split("\n\n")[0].split())
    keys.command(_name, short_help=_short)(_command)
