"""Requirements of the lab on the machine, and the check for missing ones."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# Program -> Debian package that has it.
_PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
_MORE_FOLDERS = ("/usr/sbin", "/sbin", "/usr/local/sbin")


def find_program(name: str) -> str | None:
    """Return the path of a program, searched in the folders of root's PATH too."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_MORE_FOLDERS])
    return shutil.which(name, path=path)


def missing_requirements() -> list[tuple[str, str]]:
    """Return missing requirements, each with a hint; empty if the lab can be built."""
    if sys.platform != "linux":
        return [("the lab needs Linux", "run it in a Linux virtual machine, as root")]
    found: list[tuple[str, str]] = []
    if os.geteuid() != 0:
        found.append(("the lab needs root, to make namespaces", "sudo scripts/lab up"))
    for name, package in _PROGRAMS.items():
        if find_program(name) is None:
            found.append((f"the lab needs {name}", f"sudo apt-get install {package}"))
    if not Path("/dev/net/tun").exists():
        found.append(("the lab needs /dev/net/tun", "sudo modprobe tun"))
    return found
