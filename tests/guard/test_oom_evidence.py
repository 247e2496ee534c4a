"""Published records of kernels about processes that they killed for memory, read back.

Log lines: GitHub equinor/ert#7797 (global), kubernetes-sigs/aws-efs-csi-driver#1218 (control group)
and openbmc/openbmc#1887 (before Linux 5.0). The entry of a killed process on Apple's systems: Apple
Developer Forums, thread 98522; what is around it: jundot/omlx#702 (macOS 26.3, an MLX server).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli.guard.oom_evidence import (
    OutOfMemoryKill,
    counted_kills,
    counter_file,
    find_in_jetsam_report,
    find_in_log,
)

KIB = 1024
LOG = """\
2024-04-29T14:55:41,678996+02:00 [  pid  ]   uid  tgid total_vm      rss pgtables_bytes swapents
2024-04-29T14:55:41,679685+02:00 oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_\
allowed=0,global_oom,task_memcg=/user.slice/user-21417.slice,task=perl,pid=1440763,uid=21417
2024-04-29T14:55:41,679700+02:00 Out of memory: Killed process 1440763 (perl) total-vm:87033376kB, \
anon-rss:60356340kB, file-rss:0kB, shmem-rss:0kB, UID:21417 pgtables:169956kB oom_score_adj:0
2024-04-29T14:55:46,947445+02:00 oom_reaper: reaped process 1440763 (perl), now anon-rss:0kB
[18026.221140] Memory cgroup out of memory: Killed process 140339 (python3) total-vm:120832kB, \
anon-rss:15596kB, file-rss:8924kB, shmem-rss:0kB, UID:0 pgtables:276kB oom_score_adj:-997
[ 4018.450000] Killed process 935 (python) total-vm:113656kB, anon-rss:102104kB, file-rss:0kB, \
shmem-rss:0kB
"""
JETSAM = """\
{"bug_type":"298","timestamp":"2026-04-10 05:05:26.00 -0500","os_version":"macOS 26.3.1 (25D2128)"}
{"bug_type": "298", "largestProcess": "Python",
 "memoryStatus": {"compressorSize": 7365318, "zoneMapCap": 34359738368, "pageSize": 16384,
  "memoryPages": {"active": 4483329}},
 "processes": [
  {"uuid": "14350be0-e8a2-3419-b7fa-42ae204997e5", "states": ["frontmost"], "killDelta": 13593,
   "lifetimeMax": 795, "age": 1001079202730, "purgeable": 0, "fds": 200, "genCount": 0,
   "coalition": 633, "rpages": 960, "reason": "per-process-limit", "pid": 4624, "idleDelta": 4,
   "name": "RebornTunnel", "cpuTime": 1223.5413490000001},
  {"uuid": "45eb176c-a6a2-3d21-a83e-e0a1d906e689", "states": ["frontmost"], "lifetimeMax": 1025,
   "age": 752714310856, "purgeable": 0, "fds": 100, "coalition": 633, "rpages": 761,
   "pid": 15273, "idleDelta": 7, "name": "RebornTunnel", "cpuTime": 28.378858999999999}]}
"""


@pytest.mark.parametrize(
    ("pid", "kill"),
    [
        (1440763, OutOfMemoryKill(1440763, "perl", 60356340 * KIB, "the machine had none left")),
        (
            140339,
            OutOfMemoryKill(
                140339, "python3", (15596 + 8924) * KIB, "its control group was at its limit"
            ),
        ),
        (935, OutOfMemoryKill(935, "python", 102104 * KIB, "")),
        (21417, None),  # a user's number, and the beginning of a process' is not that process
        (14407, None),
    ],
)
def test_the_log_of_linux(pid: int, kill: OutOfMemoryKill | None) -> None:
    assert find_in_log(LOG.splitlines(), pid) == kill


def test_only_what_was_killed_is_found_in_a_report_of_macos() -> None:
    kill = find_in_jetsam_report(JETSAM, 4624)
    assert kill == OutOfMemoryKill(4624, "RebornTunnel", 960 * 16384, "per-process-limit")
    assert str(kill) == (
        "the kernel killed pid 4624 (RebornTunnel, 15.7 MB resident, per-process-limit)"
    )
    assert find_in_jetsam_report(JETSAM, 15273) is None  # it lived on
    assert find_in_jetsam_report(JETSAM.replace("per-process-limit", "vnode-limit"), 4624) is None
    for wrong in ("", "{", "[]", "{}\n[1]", JETSAM[: len(JETSAM) // 2], '{}\n{"processes": [1]}'):
        assert find_in_jetsam_report(wrong, 4624) is None


@pytest.mark.parametrize(
    ("membership", "file", "text", "kills"),
    [
        (
            "0::/user.slice/user-1000.slice/session-4.scope\n",
            "/c/user.slice/user-1000.slice/session-4.scope/memory.events",
            "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n",
            2,
        ),
        (
            "5:devices:/\n4:cpu,memory:/docker/1\n0::/\n",
            "/c/memory/docker/1/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
            1,
        ),
        ("", None, "oom_kill_disable 0\n", None),
    ],
)
def test_control_groups(membership: str, file: str | None, text: str, kills: int | None) -> None:
    found = counter_file(membership, Path("/c"))
    assert found == (Path(file) if file else None)
    assert counted_kills(text) == kills
