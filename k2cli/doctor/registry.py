"""All checks of the doctor, in the order in which their results are shown."""

from __future__ import annotations

from k2cli.doctor import checks_gpu, checks_machine, checks_network, checks_software
from k2cli.doctor.results import Check, CheckResult, Situation

CHECKS: tuple[Check, ...] = (
    Check("ssh", checks_software.access),
    Check("k2", checks_software.installed),
    Check("versions", checks_software.versions),
    Check("system", checks_software.systems),
    Check("mpirun", checks_software.mpi),
    Check("NCCL", checks_software.nccl),
    Check("clock", checks_machine.clock),
    Check("leftovers", checks_machine.leftovers),
    Check("memory", checks_machine.memory),
    Check("load", checks_machine.load),
    Check("GPU limit", checks_machine.gpu_limit),
    Check("GPU", checks_gpu.gpus),
    Check("GPU memory", checks_gpu.memory),
    Check("disk", checks_machine.disk),
    Check("disk speed", checks_machine.disk_speed, quick=False),
    Check("sleep", checks_machine.sleep),
    Check("firewall", checks_network.firewall, quick=False),
    Check("reach", checks_network.reach, quick=False),
    Check("RDMA", checks_network.rdma),
    Check("RDMA launches", checks_network.rdma_launches),
    Check("link", checks_network.links, quick=False),
)


def run_checks(situation: Situation, *, quick: bool = False) -> list[CheckResult]:
    """Run the checks over one situation, in the registry's order."""
    chosen = [check for check in CHECKS if check.quick or not quick]
    return [result for check in chosen for result in check.run(situation)]
