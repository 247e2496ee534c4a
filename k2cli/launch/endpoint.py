"""Choose how clients reach the API of a run: address, keys and TLS."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import time
from pathlib import Path

from k2cli.access.key_file import read_keys
from k2cli.access.keys import chosen
from k2cli.access.tls_files import WARN_DAYS, TlsReport, covers, expiry_date
from k2cli.errors import K2Error, UsageError
from k2cli.launch.specification import RunDecisions
from k2cli.nodes.node import LOCALHOST, Node
from k2cli.protocol import HttpEndpoint
from k2cli.units import one_line

DEFAULT_HTTP_PORT = 8080


def choose_keys(run: RunDecisions) -> None:
    """Choose the named keys that the API accepts: by default all, if others can reach it.

    Raises:
        UsageError: if a name has no key.
        K2Error: if the file of the keys cannot be used.
    """
    choice = run.request.keys
    if choice is None:
        choice = "none" if is_loopback(run.request.host) else "all"
    run.named_keys = choice
    if choice == "none":
        return
    known = {key.name for key in read_keys()}
    if not isinstance(choice, str) and (missing := [name for name in choice if name not in known]):
        hint = f"k2 keys create {missing[0]}"
        if known:
            hint += f"; known keys: {', '.join(sorted(known))}"
        raise UsageError(f"there is no key '{missing[0]}'", hint)


def check_tls(run: RunDecisions) -> None:
    """Check the TLS certificate and its key on the leader's node.

    Raises:
        UsageError: if they cannot be used.
    """
    run.tls = None
    paths, leader = _tls_paths(run), run.nodes[0]
    if paths is None:
        return
    report: TlsReport = leader.ask(TlsReport, "check-tls", *paths)
    if report.problem:
        place = "" if leader.is_local else f"on {leader.name}: "
        raise UsageError(f"{place}{report.problem}", report.hint or None)
    run.tls = report


def _tls_paths(run: RunDecisions) -> tuple[str, str] | None:
    """Return the paths of certificate and key on the leader's node; None without TLS.

    Raises:
        UsageError: if the leader is another machine, where a relative path means nothing.
    """
    certificate, key = run.request.tls_certificate, run.request.tls_key
    if certificate is None or key is None:
        return None
    leader = run.nodes[0]
    if leader.is_local:
        return str(Path(certificate).absolute()), str(Path(key).absolute())
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        if not path.startswith("/"):
            raise UsageError(
                f"{option} '{one_line(path)}' is not an absolute path, and {leader.name} reads it",
                f"{option} /etc/k2/{Path(path).name}, a file on {leader.name}",
            )
    return certificate, key


def choose_endpoint(run: RunDecisions) -> None:
    """Choose the API's port and key.

    A key is generated if others than this machine reach the API, or named keys are accepted: k2's
    own commands use it.
    """
    request, tls = run.request, _tls_paths(run)
    port = _http_port(run.nodes[0], request.host, request.port)
    guarded = not is_loopback(request.host) or run.named_keys != "none"
    run.generated_api_key = guarded and not request.api_key
    api_key = f"k2-{secrets.token_urlsafe(24)}" if run.generated_api_key else request.api_key
    run.http = HttpEndpoint(
        request.host,
        port,
        api_key or None,
        next_port_will_do=request.port is None,
        allowed_hosts=list(request.allowed_hosts),
        cors_origins=list(request.cors_origins),
        aliases=list(request.aliases),
        tool_parser=request.tool_parser,
        reasoning_parser=request.reasoning_parser,
        normalizes_prompts=request.normalizes_prompts,
        shares_prefixes=request.shares_prefixes,
        tls_certificate=tls[0] if tls else None,
        tls_key=tls[1] if tls else None,
    )


def endpoint_warnings(run: RunDecisions) -> list[str]:
    """Return what the user should know about keys and TLS before clients connect."""
    host, tls = run.request.host, run.tls
    if tls is None:
        if run.http.api_key is None or is_loopback(host):
            return []
        return [
            "keys and texts travel unencrypted to every client: with a certificate, --tls-cert and "
            "--tls-key encrypt them"
        ]
    found = []
    if not tls.names:
        found.append("the TLS certificate has no names (subjectAltName), so clients refuse it")
    elif not _is_any_address(host) and not covers(tls.names, host):
        found.append(f"the TLS certificate is not for {host}, so clients that ask for it refuse it")
    if tls.expires < time.time() + WARN_DAYS * 86_400:
        found.append(f"the TLS certificate is valid until {expiry_date(tls)} only")
    return found


def _is_any_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def _http_port(leader: Node, host: str, wanted: int | None) -> int:
    if wanted is None:
        return leader.choose_port(host, DEFAULT_HTTP_PORT)
    if not 1 <= wanted <= 65535:
        raise UsageError(f"--port {wanted} is not between 1 and 65535")
    holder = leader.port_holder(host, wanted)
    if holder is not None:
        free = leader.choose_port(host, DEFAULT_HTTP_PORT)
        raise K2Error(f"port {wanted} of {leader.name} cannot be used: {holder}", f"--port {free}")
    return wanted


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == LOCALHOST


def key_setting(run: RunDecisions) -> str:
    """Describe the named keys that the API accepts now."""
    if run.named_keys == "none":
        return "none"
    names = ", ".join(key.name for key in chosen(read_keys(), run.named_keys))
    if run.named_keys != "all":
        return names
    return f"all: {names or 'there are none yet'}"
