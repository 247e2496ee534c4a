"""The files of a host: accounts, names, keys, sshd's and ssh's settings, and its home folder.

The account is root with another home: a Python that lives below root's own home would vanish if
something were mounted there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.requirements import find_program
from lab.state import ROOT

HOME = "/run/home"
_SSH_FOLDER = "/run/lab-ssh"
SSHD_CONFIG = f"{_SSH_FOLDER}/sshd_config"
# Folders that each host has of its own, in memory.
OWN_FOLDERS = {
    "/tmp": "mode=1777",
    "/run": "mode=755",
    "/dev/shm": "mode=1777",
    "/var/tmp": "mode=1777",
}
# Made in them for programs that expect them.
KEPT_FOLDERS = ("/run/sshd", "/run/lock")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# PidFile: with /dev/null sshd would delete that device when it ends.
_SSHD = """\
Port 22
HostKey {folder}/host_key
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile {home}/.ssh/authorized_keys
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
MaxSessions 100
SetEnv PYTHONPATH={root}
PermitUserEnvironment PATH
Subsystem sftp internal-sftp
"""
_SSH = """\
Host *
  User root
  IdentityFile ~/.ssh/id_ed25519
  IdentitiesOnly yes
  UserKnownHostsFile ~/.ssh/known_hosts
  StrictHostKeyChecking yes
"""


def environment() -> dict[str, str]:
    """Return the environment of programs in a host, without the k2 settings of this process."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        "HOME": HOME,
        "USER": "root",
        "LOGNAME": "root",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def login_path(folder: Path, first: Path | None) -> None:
    """Set the PATH of commands over ssh on the host of ``folder``.

    Args:
        folder: the host's folder, see ``write_files``.
        first: put before the PATH of sshd; None for that PATH alone.
    """
    path = folder / "home" / ".ssh" / "environment"
    if first is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(f"PATH={first}:{_PATH}\n")


def make_key(path: Path, comment: str) -> str:
    """Make an Ed25519 key without passphrase, and return the public line."""
    for old in (path, path.with_name(f"{path.name}.pub")):
        old.unlink(missing_ok=True)
    program = find_program("ssh-keygen") or "ssh-keygen"
    arguments = [program, "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise LabError(f"ssh-keygen failed: {done.stderr.strip()}")
    return path.with_name(f"{path.name}.pub").read_text().strip()


def known_hosts(keys: Mapping[str, str], names: Mapping[str, list[str]]) -> str:
    """Return a line per host with its names, addresses and public key."""
    lines = []
    for host, key in keys.items():
        kind, value = key.split()[:2]
        lines.append(f"{','.join(names[host])} {kind} {value}")
    return "\n".join(lines) + "\n"


def write_files(folder: Path, name: str, user_key: Path, known: str, hosts: str) -> None:
    """Write the files of host ``name`` into ``folder``: ``etc``, ``ssh`` and ``home``."""
    for part in ("etc", "ssh", "home/.ssh"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    accounts = Path("/etc/passwd").read_text().splitlines()
    root = f"root:x:0:0:root:{HOME}:/bin/bash"
    others = [line for line in accounts if not line.startswith("root:")]
    (folder / "etc" / "passwd").write_text("\n".join([root, *others]) + "\n")
    # A locked password would make sshd refuse the account whatever the key.
    shadow = folder / "etc" / "shadow"
    shadow.write_text("root:*:20000:0:99999:7:::\n")
    shadow.chmod(0o600)
    (folder / "etc" / "hosts").write_text(hosts)
    (folder / "etc" / "resolv.conf").write_text("")
    (folder / "etc" / "hostname").write_text(f"{name}\n")
    settings = _SSHD.format(folder=_SSH_FOLDER, home=HOME, root=ROOT)
    (folder / "ssh" / "sshd_config").write_text(settings)
    own = folder / "home" / ".ssh"
    own.chmod(0o700)
    shutil.copy(user_key, own / "id_ed25519")
    (own / "id_ed25519").chmod(0o600)
    public = user_key.with_name(f"{user_key.name}.pub")
    shutil.copy(public, own / "id_ed25519.pub")
    shutil.copy(public, own / "authorized_keys")
    (own / "known_hosts").write_text(known)
    (own / "config").write_text(_SSH)


def mount_orders(folder: Path, share: list[Path]) -> dict[str, Any]:
    """Return the mounts that ``lab.init`` makes in a host whose files are in ``folder``.

    Args:
        folder: as given to ``write_files``.
        share: folders that must stay visible even below a folder that each host has of its own.
    """
    wanted = [ROOT, Path(sys.prefix), Path(sys.base_prefix), folder.parent, *share]
    paths = {str(path.resolve()) for path in wanted} | {str(path.absolute()) for path in wanted}
    keep = sorted(
        path
        for path in paths
        if Path(path).exists() and any(path.startswith(f"{own}/") for own in OWN_FOLDERS)
    )
    etc = [
        [str(folder / "etc" / name), f"/etc/{name}"]
        for name in ("passwd", "shadow", "hosts", "resolv.conf", "hostname")
        # A mount needs an existing target; files of the machine are never created.
        if Path("/etc", name).exists() and not Path("/etc", name).is_symlink()
    ]
    return {
        "keep": keep,
        "tmpfs": {path: how for path, how in OWN_FOLDERS.items() if Path(path).is_dir()},
        "folders": list(KEPT_FOLDERS),
        "bind": [
            *etc,
            [str(folder / "ssh"), _SSH_FOLDER],
            [str(folder / "home"), HOME],
        ],
    }
