"""A host with NVIDIA GPUs for tests: what MLX and nvidia-smi say of it, without a GPU."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from k2cli.agent import gpus as agent_gpus
from k2cli.planning.hardware import gpus as hardware_gpus
from k2cli.planning.hardware.machine import NodeMemory, cuda_machine

MIB = 2**20
H200_MIB = 143_771
H200_RESERVED_MIB = 604
UUIDS = tuple(f"GPU-{order:08x}-1111-2222-3333-444455556666" for order in range(8))

_PROGRAM = """#!/usr/bin/env python3
import json, pathlib, sys
host = json.loads(pathlib.Path(__file__).with_name("host.json").read_text())
print("\\n".join(host["processes" if "compute-apps" in sys.argv[1] else "gpus"]))
"""


@dataclass(slots=True)
class GpuHost:
    """The GPUs of a host. ``lines`` and ``processes`` are what nvidia-smi prints."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)

    def write(self) -> None:
        """Write what the fake nvidia-smi prints."""
        content = {"gpus": self.lines, "processes": self.processes}
        (self.folder / "host.json").write_text(json.dumps(content))

    def use(self, index: int, pid: int, name: str, mib: int) -> None:
        """Let a process take memory of a GPU."""
        cells = self.lines[index].split(", ")
        cells[4] = str(int(cells[4]) - mib)
        self.lines[index] = ", ".join(cells)
        self.processes.append(f"{UUIDS[index]}, {pid}, {mib}, {name}")
        self.write()

    def set(self, index: int, column: int, text: str) -> None:
        """Change a cell of nvidia-smi's line for a GPU."""
        cells = self.lines[index].split(", ")
        cells[column] = text
        self.lines[index] = ", ".join(cells)
        self.write()

    def devices(self) -> list[dict[str, Any]]:
        """Return MLX's ``device_info`` of the visible GPUs, in CUDA's order."""
        return [
            {
                "device_name": "NVIDIA H200",
                "uuid": UUIDS[index],
                "total_memory": H200_MIB * MIB,
                "free_memory": (H200_MIB - H200_RESERVED_MIB) * MIB,
            }
            for index in self.visible
        ]

    def machine(self) -> NodeMemory:
        """Return the host as the planner sees it."""
        return cuda_machine("localhost", self.devices())


def make_gpu_host(folder: Path, count: int, patch: pytest.MonkeyPatch) -> GpuHost:
    """Make this machine, for the agent, a host with so many idle H200s."""
    folder.mkdir()
    host = GpuHost(folder, visible=list(range(count)))
    for index in range(count):
        free = H200_MIB - H200_RESERVED_MIB
        cells = (index, UUIDS[index], "NVIDIA H200", H200_MIB, free, H200_RESERVED_MIB)
        host.lines.append(", ".join(map(str, cells)) + ", Default, Disabled")
    host.write()
    program = folder / "nvidia-smi"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    patch.setattr(agent_gpus, "this_machine", host.machine)
    # On a machine that many tests share, its program may take seconds to start.
    patch.setattr(hardware_gpus, "_QUERY_SECONDS", 60.0)
    return host
