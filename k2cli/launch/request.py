"""The request of a launch: the options of ``k2 launch`` as values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from k2cli.access.keys import KeyChoice
from k2cli.choices import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    Head,
    KvBits,
    Parallel,
    Speculation,
    WantedFloatType,
    WantedLinkCheck,
    WantedTransport,
)
from k2cli.errors import UsageError
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.protocol import Deadlines
from k2cli.units import one_line

DEFAULT_WORKER = "k2cli.rank.main"
LINK_CHECK_TOKENS = 4096
"""Wrong text was reported for prompts above 2,000 to 4,000 tokens."""

_KEY_HINT = "set K2_API_KEY to one word, for example the output of: openssl rand -hex 24"
# Names that clients send, such as openai/gpt-4.1 and claude-sonnet-4-5[1m].
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+\[\]-]{0,199}")
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """The options of a launch. None and ``auto`` leave the choice to k2.

    ``ends_with_chats``: the run ends once no chat holds its lease; ``ends_with_check``: once the
    command that checks with it does not. ``link_check_tokens`` are the lengths of the prompts of
    the link check, and ``link_check_seconds`` about the longest that each may take; None leaves it
    to the devices. ``joins_projections``: whether ranks join projections of the same input
    (``rank.joined_projections``), on every device.
    """

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
    kv_bits: KvBits = 0
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    keys: KeyChoice | None = None
    shares_prefixes: bool = False
    prefix_disk_bytes: int = 0
    tls_certificate: str | None = None
    tls_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    normalizes_prompts: bool = True
    speculation: Speculation = "auto"
    plan_file: Path | None = None
    force: bool = False
    cluster: str | None = None
    share: bool = False
    wait_seconds: float = 0.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    fast_synch: bool = False
    joins_projections: bool | None = None
    deadlines: Deadlines = field(default_factory=Deadlines)
    worker: str = DEFAULT_WORKER
    fetch: bool = False
    ends_with_chats: bool = False
    ends_with_check: bool = False
    link_check: WantedLinkCheck = "auto"
    link_check_tokens: tuple[int, ...] = (LINK_CHECK_TOKENS,)
    link_check_seconds: float | None = None

    @property
    def lease_cause(self) -> str:
        """The cause of the end once nobody holds the lease; empty for a run that stays."""
        if self.ends_with_chats:
            return "its last chat has left"
        return "the command that it was for has ended" if self.ends_with_check else ""


def checked_request(request: LaunchRequest) -> LaunchRequest:
    """Return the request with names and origins as clients send them.

    Raises:
        UsageError: if the key, a name, an origin or an alias is one that no client can send,
            there is no parser of that name, or options exclude each other.
    """
    if request.api_key is not None:
        _check_api_key(request.api_key)
    _check_tls_options(request)
    if request.joins_projections and request.plan_file is not None:
        raise UsageError(
            "--joined-projections needs memory that a saved plan may not have", "leave out --plan"
        )
    _check_parser("--tool-parser", request.tool_parser, TOOL_PARSERS)
    _check_parser("--reasoning-parser", request.reasoning_parser, REASONING_PARSERS)
    return replace(
        request,
        allowed_hosts=tuple(_checked_host(name) for name in request.allowed_hosts),
        cors_origins=tuple(_checked_origin(origin) for origin in request.cors_origins),
        aliases=tuple(dict.fromkeys(_checked_alias(alias) for alias in request.aliases)),
    )


def _check_api_key(key: str) -> None:
    # The messages leave the key out, since others may see them.
    try:
        key.encode()
    except UnicodeEncodeError:
        raise UsageError("the API key is not valid UTF-8", _KEY_HINT) from None
    if not key.isprintable() or key.split() != [key]:
        raise UsageError("the API key is blank, or has spaces or control characters", _KEY_HINT)


def _check_tls_options(request: LaunchRequest) -> None:
    if (request.tls_certificate is None) == (request.tls_key is None):
        return
    missing = "--tls-key" if request.tls_key is None else "--tls-cert"
    raise UsageError(
        f"{missing} is missing: TLS needs a certificate and its private key",
        "--tls-cert cert.pem --tls-key key.pem",
    )


def _checked_host(name: str) -> str:
    if not _HOST_NAME.fullmatch(name):
        raise UsageError(f"--allow-host '{name}' is not a name", "--allow-host studio.local")
    return name.lower()


def _check_parser(option: str, name: str | None, known: Sequence[str]) -> None:
    if name is not None and name not in known:
        message = f"{option} '{one_line(name)}' is not the name of a parser"
        hint = f"leave {option} out to use the form of the model's chat template, or give one of: "
        raise UsageError(message, hint + ", ".join(known))


def _checked_alias(alias: str) -> str:
    if not _ALIAS.fullmatch(alias):
        message = f"--alias '{one_line(alias)}' is not a name of a model"
        raise UsageError(message, "--alias claude-sonnet-4-5")
    return alias


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
