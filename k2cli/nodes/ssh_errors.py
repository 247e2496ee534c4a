"""Errors made from OpenSSH's messages, with the cause and a command that fixes it.

ssh has one exit status for all of its failures, so its messages must be read: those of OpenSSH 8
and 9 on Linux and macOS, which are not translated.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from k2cli.errors import ClusterError, NodeAccessError

_REASON = re.compile(r"^(?:ssh|mux_client\w*|client_loop|kex_exchange_identification): ")
# The banner around a changed key, and other lines that are not the reason.
_NOISE = re.compile(r"^(?:@+|\s*|Warning: .*|Host key verification failed\.|debug\d: .*)$")


def ssh_error(node: str, stderr: str) -> ClusterError:
    """Make the error for ssh's stderr after exit status 255."""
    for pattern, make in _KINDS:
        if re.search(pattern, stderr):
            return make(node, stderr)
    return ClusterError(
        f"the connection to node {node} failed: {_reason(stderr) or 'ssh gave no reason'}",
        f"ssh {node} true",
    )


def timed_out(node: str, seconds: float) -> ClusterError:
    """Make the error for a node that did not answer within the time limit."""
    return ClusterError(
        f"node {node} cannot be reached: it did not answer within {seconds:.0f} s",
        f"is it on, awake and on this network? Try: ssh {node} true",
    )


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if not _NOISE.match(line)]
    return _REASON.sub("", lines[-1]) if lines else ""


def _unknown_name(node: str, stderr: str) -> ClusterError:
    return ClusterError(
        f"node {node} cannot be reached: its name is unknown ({_reason(stderr)})",
        f"write its address into ~/.ssh/config: Host {node}, HostName ADDRESS",
    )


def _refused(node: str, stderr: str) -> ClusterError:
    return ClusterError(
        f"node {node} cannot be reached: nothing answers ssh there ({_reason(stderr)})",
        "turn on Remote Login there (macOS: System Settings, General, Sharing; Linux: start sshd)",
    )


def _unreachable(node: str, stderr: str) -> ClusterError:
    return ClusterError(
        f"node {node} cannot be reached: {_reason(stderr)}",
        f"is it on, awake and on this network? Try: ssh {node} true",
    )


def _denied(node: str, stderr: str) -> ClusterError:
    return NodeAccessError(
        f"node {node} denied access: {_reason(stderr)}",
        f"ssh-copy-id {node}, or ssh-add if your key has a passphrase",
    )


def _key_changed(node: str, stderr: str) -> ClusterError:
    told = re.search(r"^\s*(ssh-keygen -f .* -R .*)$", stderr, re.MULTILINE)
    forget = told.group(1).strip() if told else f"ssh-keygen -R {node}"
    return ClusterError(
        f"node {node} shows another host key than the one known here: it was reinstalled, "
        "or another machine answers in its place",
        f"if you know the reason, remove the old key and check the new one: {forget} && ssh {node}",
    )


def _key_unknown(node: str, stderr: str) -> ClusterError:
    return ClusterError(
        f"the host key of node {node} is not known here",
        f"check it once and accept it: ssh {node} true",
    )


_Maker = Callable[[str, str], ClusterError]
_KINDS: tuple[tuple[str, _Maker], ...] = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed", _key_changed),
    (r"Host key verification failed|host key is known for|requested strict checking", _key_unknown),
    (r"Could not resolve hostname|Name or service not known|nodename nor servname", _unknown_name),
    (r"Permission denied|Too many authentication failures|Authentication failed", _denied),
    (r"Connection refused", _refused),
    (
        r"timed out|No route to host|Network is unreachable|Host is down|not responding",
        _unreachable,
    ),
)
