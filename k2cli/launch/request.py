"""The request of a launch: the options of ``k2 launch`` as values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from k2cli.choices import Head, Parallel, WantedFloatType, WantedTransport
from k2cli.errors import UsageError
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.protocol import Deadlines

DEFAULT_WORKER = "k2cli.rank.main"
_KEY_HINT = "set K2_API_KEY to one word, for example the output of: openssl rand -hex 24"
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """The options of a launch. None and ``auto`` leave the choice to k2."""

    model: str
    nodes: tuple[str, ...] | None = None
    transport: WantedTransport = "auto"
    parallel: Parallel = "auto"
    dtype: WantedFloatType = "auto"
    head: Head = "auto"
    context_length: int | None = None
    concurrency: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    plan_file: Path | None = None
    force: bool = False
    cluster: str | None = None
    share: bool = False
    wait_seconds: float = 0.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    fast_synch: bool = False
    deadlines: Deadlines = field(default_factory=Deadlines)
    worker: str = DEFAULT_WORKER
    fetch: bool = False


def checked_request(request: LaunchRequest) -> LaunchRequest:
    """Return the request with names and origins as clients send them.

    Raises:
        UsageError: if the key, a name or an origin is one that no client can send.
    """
    if request.api_key is not None:
        _check_api_key(request.api_key)
    return replace(
        request,
        allowed_hosts=tuple(_checked_host(name) for name in request.allowed_hosts),
        cors_origins=tuple(_checked_origin(origin) for origin in request.cors_origins),
    )


def _check_api_key(key: str) -> None:
    # The messages leave the key out, since others may see them.
    try:
        key.encode()
    except UnicodeEncodeError:
        raise UsageError("the API key is not valid UTF-8", _KEY_HINT) from None
    if not key.isprintable() or key.split() != [key]:
        raise UsageError("the API key is blank, or has spaces or control characters", _KEY_HINT)


def _checked_host(name: str) -> str:
    if not _HOST_NAME.fullmatch(name):
        raise UsageError(f"--allow-host '{name}' is not a name", "--allow-host studio.local")
    return name.lower()


def _checked_origin(origin: str) -> str:
    if origin == "*":
        return origin
    try:
        parts = urlsplit(origin)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in origin
        plain = parts.port != 0 and not (parts.path.strip("/") or parts.query or parts.fragment)
    except ValueError:  # a bracket without its pair, or a port that is no number
        known = plain = False
    if not known or not plain or any(letter.isspace() for letter in origin):
        raise UsageError(f"--cors '{origin}' is not an origin", "--cors https://chat.example")
    return f"{parts.scheme}://{parts.netloc.lower()}"
