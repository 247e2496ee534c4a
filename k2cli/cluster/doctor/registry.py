"""All checks of the doctor, in the order in which their results are shown."""

from __future__ import annotations

from k2cli.cluster.doctor import checks_machine, checks_network, checks_software
from k2cli.cluster.doctor.results import Check, CheckResult, Situation

CHECKS: tuple[Check, ...] = (
    Check("ssh", "every node answers without a password", checks_software.access),
    Check("k2", "k2 answers there and mlx loads", checks_software.installed),
    Check("versions", "same k2, mlx, mlx-lm and Python", checks_software.versions),
    Check("system", "same system", checks_software.systems),
    Check("mpirun", "same Open MPI", checks_software.mpi),
    Check("clock", "clocks agree", checks_machine.clock),
    Check("leftovers", "no process of an ended run", checks_machine.leftovers),
    Check("memory", "free memory and who holds it", checks_machine.memory),
    Check("load", "nothing else keeps the cores busy", checks_machine.load),
    Check("GPU limit", "what MLX may use", checks_machine.gpu_limit),
    Check("disk", "the models' volume", checks_machine.disk),
    Check("disk speed", "reading the checkpoint", checks_machine.disk_speed, quick=False),
    Check("sleep", "machines stay awake", checks_machine.sleep),
    Check("firewall", "incoming connections", checks_network.firewall, quick=False),
    Check("reach", "addresses reach each other", checks_network.reach, quick=False),
    Check("RDMA", "RDMA over Thunderbolt", checks_network.rdma),
    Check("link", "latency and bandwidth", checks_network.links, quick=False),
)


def run_checks(situation: Situation, *, quick: bool = False) -> list[CheckResult]:
    """Every check over one situation, in the registry's order."""
    chosen = [check for check in CHECKS if check.quick or not quick]
    return [result for check in chosen for result in check.run(situation)]
