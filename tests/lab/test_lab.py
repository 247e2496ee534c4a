"""The lab itself: hosts that are apart, a link that does what it is told, and nothing left over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import Lab, LabError
from lab.faults import fault_named
from lab.namespaces import mount_points
from lab.state import lab_folder, labs_directory

pytestmark = pytest.mark.lab
# Prints how long a connection to k2b takes, in seconds.
CONNECT = "import socket, time; t = time.time(); s = socket.create_connection(('k2b', 22), 3); "
CONNECT += "s.recv(1); print(time.time() - t)"


def _outside() -> set[str]:
    """Return mounts and network devices, which a lab could leave on the machine."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {*mounts, *os.listdir("/sys/class/net")}


def test_each_host_is_a_machine_of_its_own(lab: Lab) -> None:
    for asking in ("console", "k2a", "k2b"):
        for host in lab.hosts:
            done = lab.exec(asking, ["ssh", host.name, "hostname; echo $HOME $$"])
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.split()[:2] == [host.name, "/run/home"]
            assert int(done.stdout.split()[2]) < 10_000  # a process id of that host's own
    lab.exec("k2a", ["touch", "/tmp/here", "/dev/shm/here", "/var/tmp/here", "here"])
    there = lab.exec("k2b", ["ls", "/tmp/here", "/dev/shm/here", "/var/tmp/here", "here"])
    assert there.stdout == ""
    assert not Path("/dev/shm/here").exists()
    settings = lab.exec("k2a", ["env"]).stdout
    assert "K2_" not in settings
    assert "XDG_" not in settings


def _state(lab: Lab) -> dict[str, object]:
    """Return mounts, processes and all files of each host that are its own."""
    found: dict[str, object] = {}
    for host in (*lab.hosts, lab.console):
        listing = (
            "find /tmp /run /dev/shm /var/tmp -xdev \\( -path /tmp/pytest-of-* -prune \\) -o -print"
        )
        found[host.name] = (
            sorted(mount_points(host.state)),
            sorted(lab.exec(host.name, ["sh", "-c", listing]).stdout.split()),
            {
                path: path.read_bytes()
                for part in ("home", "etc", "ssh")
                for path in (host.folder / part).rglob("*")
                if path.is_file() and path.name != "sshd.log"
            },
            [process.command for process in lab.processes(host.name)],
        )
    return found


def test_nothing_that_a_test_did_reaches_the_next_one(session_lab: Lab) -> None:
    lab = session_lab
    lab.renew()
    new = _state(lab)
    k2 = [sys.executable, "-m", "k2cli"]
    made = lab.exec("k2a", [*k2, "cluster", "init", "k2a", "k2b", "--name", "pair"])
    assert made.returncode == 0, made.stderr
    # A connection that outlives its command, as that of a killed k2.
    shared = ["-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-S", "/tmp/shared"]
    assert lab.exec("k2a", ["ssh", *shared, "k2b", "true"]).returncode == 0
    assert any(found.is_shared_ssh for found in lab.all_processes("k2a"))
    script = """
    mkdir -p .cache/huggingface/hub/models--a--b /var/tmp/k2-locks /tmp/k2-run /run/lock/here
    touch .cache/huggingface/hub/models--a--b/blob /var/tmp/k2-locks/8080.json /dev/shm/k2-page
    ln -s /usr /tmp/k2-run/usr
    echo "k2c ssh-ed25519 AAAA" >>.ssh/known_hosts; echo PATH=/ >.ssh/environment; rm .ssh/config
    echo "10.0.0.1 k2b" >>/etc/hosts
    echo "SetEnv A=b" >>/run/lab-ssh/sshd_config
    mount -t tmpfs none /usr/share; mount -t tmpfs none .cache; mount -t tmpfs none .cache
    sleep 100 >/dev/null 2>&1 &
    """
    for host in ("k2b", "console"):
        done = lab.exec(host, ["sh", "-c", script])
        assert done.returncode == 0, done.stderr
    fault_named("host-key").act(lab, None)
    assert _state(lab) != new
    lab.renew()
    assert _state(lab) == new
    assert Path("/usr/bin/env").exists()
    answer = lab.exec("k2a", ["ssh", "k2b", "echo $A; hostname"])
    assert (answer.returncode, answer.stdout.split()) == (0, ["k2b"])


def test_compiled_kernels_stay_and_nothing_beside_them(session_lab: Lab, tmp_path: Path) -> None:
    caches = [host.home / ".cache" for host in session_lab.hosts]
    kernels = "k2/mlx-lab/cpu/mlx-0"
    session_lab.renew()
    before = {path for cache in caches for path in cache.rglob("*")}
    for path in (
        f"{kernels}/a.so",
        "k2/mlx-lab/cpu/processes/1-a/a.so",
        "k2/prefixes/a",
        "other/a",
    ):
        (caches[0] / path).parent.mkdir(parents=True)
        (caches[0] / path).touch()
    (tmp_path / kernels).mkdir(parents=True)
    (tmp_path / "mine").touch()
    (session_lab.console.home / ".cache").symlink_to(tmp_path)
    try:
        session_lab.renew()
        made = {path for cache in caches for path in cache.rglob("*")} - before
        assert {path for path in made if path.is_file()} == {caches[0] / kernels / "a.so"}
        assert not (session_lab.console.home / ".cache").is_symlink()
        assert (tmp_path / "mine").exists()
    finally:
        shutil.rmtree(caches[0] / "k2" / "mlx-lab")


def test_processes_are_counted_by_host(lab: Lab) -> None:
    assert [lab.process_count(host.name) for host in lab.hosts] == [0, 0]
    sleeper = lab.start("k2b", ["sh", "-c", "sleep 100 & sleep 100"])
    _wait(lambda: lab.process_count("k2b") == 3)
    assert lab.process_count("k2a") == 0
    for process in lab.processes("k2b"):
        os.kill(process.pid, signal.SIGKILL)
    _wait(lambda: lab.process_count("k2b") == 0)
    sleeper.communicate()


def _wait(condition: object, seconds: float = 10.0) -> None:
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_link_does_what_it_is_told(lab: Lab) -> None:
    lab.link.set(latency_ms=50)
    slow = float(lab.exec("k2a", [sys.executable, "-c", CONNECT]).stdout)
    assert slow >= 0.2  # there and back for the connection, and for the greeting
    lab.link.set(silent=True)
    assert "TimeoutError" in lab.exec("k2a", [sys.executable, "-c", CONNECT]).stderr
    lab.link.set()
    assert not lab.link.relayed
    lab.link_down("k2b")
    assert lab.exec("k2a", [sys.executable, "-c", CONNECT]).returncode == 1
    lab.link_up("k2b")
    assert lab.exec("k2a", [sys.executable, "-c", CONNECT]).returncode == 0


def test_a_link_changes_under_a_living_connection(lab: Lab) -> None:
    """Silence, and then a good link again: TCP itself carries on."""
    server = "import socket; s = socket.create_server(('', 9000)); c, _ = s.accept(); "
    server += "[c.sendall(d) for d in iter(lambda: c.recv(100), b'')]"
    client = "import socket, sys; s = socket.create_connection(('k2b', 9000)); "
    client += "[(s.sendall(l.encode()), print(s.recv(100), flush=True)) for l in sys.stdin]"
    served = lab.start("k2b", [sys.executable, "-c", server])
    _wait(lambda: ":2328 " in Path(f"/proc/{lab.host(1).state.pid}/net/tcp").read_text())
    command = lab.command("k2a", [sys.executable, "-c", client])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as echo:
        assert echo.stdin is not None
        assert echo.stdout is not None
        echo.stdin.write(b"one\n")
        assert echo.stdout.readline() == b"b'one\\n'\n"
        lab.link.set(silent=True)
        echo.stdin.write(b"two\n")
        time.sleep(0.3)
        lab.link.set(latency_ms=1)
        assert echo.stdout.readline() == b"b'two\\n'\n"
        lab.link.set()
        echo.stdin.write(b"three\n")
        assert echo.stdout.readline() == b"b'three\\n'\n"
    served.communicate(timeout=10)


def test_up_again_changes_nothing_and_down_leaves_nothing(session_lab: Lab) -> None:
    name = f"second-{os.getpid()}"
    before = _outside()
    first = Lab.up(name, 3)
    try:
        again = Lab.up(name, 3)
        assert [host.state for host in again.hosts] == [host.state for host in first.hosts]
        assert first.exec("k2c", ["ssh", "k2a", "hostname"]).stdout == "k2a\n"
        # Beside the session's own lab, with the same names and addresses.
        assert session_lab.exec("k2a", ["hostname"]).stdout == "k2a\n"
        os.kill(first.host("k2b").state.pid, signal.SIGKILL)
        _wait(lambda: not first.all_processes("k2b"))
        with pytest.raises(LabError, match="not up"):
            Lab.attach(name)
        third = Lab.up(name, 2)
        assert third.exec("k2a", ["ssh", "k2b", "hostname"]).stdout == "k2b\n"
        third.down()
    finally:
        first.down()
    assert not lab_folder(name).exists()
    assert _outside() == before


def test_a_tied_lab_ends_with_its_owner(session_lab: Lab) -> None:
    name = f"tied-{os.getpid()}"
    code = f"from lab import Lab; import time; Lab.up({name!r}, 1, tied=True); "
    code += "print('up', flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        left = Lab.attach(name)
        owner.kill()
    _wait(lambda: not left.all_processes("k2a"))
    left.down()
    assert name not in os.listdir(labs_directory())


def test_the_command_line(session_lab: Lab) -> None:
    def scripts_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lab", *arguments], capture_output=True, text=True, timeout=60
        )

    done = scripts_lab("exec", "--name", "none", "k2a", "--", "true")
    assert done.returncode == 1
    assert done.stderr == "error: lab 'none' is not up\nhint: scripts/lab up --name none\n"
    done = scripts_lab("up", "--name", "../x")
    assert done.returncode == 1
    assert "'../x' is not a valid lab name" in done.stderr
    # Imported as root, since another user may not be able to read this Python.
    code = "import os, lab.__main__ as m; os.setuid(65534); raise SystemExit(m.main(['up']))"
    refused = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: the lab needs root, to make namespaces\nhint: sudo scripts/lab up\n"
    )
