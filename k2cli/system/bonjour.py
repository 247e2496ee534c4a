"""The name of a Mac in its local network, which stays when its host name changes."""

from __future__ import annotations

import functools
import subprocess
import sys

_PROGRAM = "/usr/sbin/scutil"
_SECONDS = 5.0


@functools.cache
def bonjour_name() -> str:
    """Return NAME of ``NAME.local`` in lower case; "" on systems that have none of their own.

    A Mac takes the host name that the network, or a VPN, has for its address, unless the user has
    set one with ``scutil --set HostName`` (tailscale/tailscale#4003).
    """
    if sys.platform != "darwin":
        return ""
    command = [_PROGRAM, "--get", "LocalHostName"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip().lower()
