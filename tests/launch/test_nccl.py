"""NCCL as a transport, without a GPU: where it is chosen or refused, and what ranks are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from k2cli.agent.nccl import Nccl
from k2cli.agent.networks import Network
from k2cli.cli import run_command_line
from k2cli.errors import ClusterError, UsageError
from k2cli.guard.spawn import group_settings
from k2cli.launch.nccl import NcclRoute, nccl_route
from k2cli.launch.request import LaunchRequest
from k2cli.launch.specification import renew_bootstraps
from k2cli.launch.transport import check_nodes, choose_transport
from k2cli.nodes.local import LocalNode
from k2cli.nodes.node import Node
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.plan import NodeBudget
from k2cli.planning.request import PlanRequest
from k2cli.protocol import Assignment, Bootstrap
from tests.support.bootstraps import make_assignment

HERE = LocalNode()


@dataclass(frozen=True)
class GpuNode:
    """A machine with GPUs, as far as the choice of a transport asks it."""

    answer: Nccl
    name: str = "localhost"
    is_local: bool = True
    networks: tuple[Network, ...] = ()

    def ask(self, kind: Any, verb: str) -> Any:
        return {"nccl": self.answer, "networks": list(self.networks)}[verb]


def _nodes(gpus: int, ranks: int = 2, obstacle: str | None = None) -> list[Node]:
    return [cast("Node", GpuNode(Nccl(gpus, obstacle)))] * ranks


def test_this_machine_without_gpu_is_refused_with_another_transport(toy_k2: Path) -> None:
    command = ["launch", str(toy_k2), "--nodes", "localhost,localhost", "--backend", "nccl"]
    with pytest.raises(UsageError, match="NVIDIA GPUs, and MLX computes with") as refused:
        run_command_line(command)
    assert (refused.value.exit_code, refused.value.hint) == (2, "--backend ring")


def test_auto_takes_nccl_for_the_gpus_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert choose_transport("auto", _nodes(2)) == "nccl"
    assert choose_transport("auto", _nodes(2), "tensor") == "nccl"
    transport, reason = check_nodes(_nodes(2), "auto", print, force=False)
    assert (transport, "48 us" in reason) == ("nccl", True)
    # A pipeline, too few GPUs, a build without NCCL, two machines: another transport.
    assert choose_transport("auto", _nodes(2), "pipeline") == "ring"
    assert choose_transport("auto", _nodes(1)) == "ring"
    assert choose_transport("auto", _nodes(2, obstacle="this build of MLX has no NCCL")) == "ring"
    other = cast("Node", GpuNode(Nccl(2), "b", is_local=False))
    assert choose_transport("auto", [*_nodes(2, 1), other]) == "ring"
    assert choose_transport("nccl", [*_nodes(2, 1), other]) == "nccl"


@pytest.mark.parametrize(
    ("nodes", "parallel", "says"),
    [
        (_nodes(1), "auto", r"localhost has 1 GPU\(s\) for 2 ranks"),
        (_nodes(2, obstacle="this build of MLX has no NCCL"), "auto", "localhost: this build"),
        (_nodes(2), "pipeline", "cannot send"),
    ],
)
def test_nccl_where_it_cannot_work(nodes: list[Node], parallel: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        choose_transport("nccl", nodes, parallel)
    assert refused.value.hint == "--backend ring"


def test_auto_falls_back_to_a_pipeline_where_slices_are_impossible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from k2cli.launch import plan

    @dataclass
    class FakePlan:
        fits: bool
        nodes: tuple[NodeBudget, ...] = ()

    asked: list[str] = []
    outcomes: dict[str, Any] = {"nccl": UsageError("64 heads and 3 ranks"), "ring": FakePlan(True)}

    def make(request: Any, folder: Any, nodes: Any, transport: str, *_: Any) -> Any:
        asked.append(transport)
        if isinstance(outcomes[transport], Exception):
            raise outcomes[transport]
        return outcomes[transport]

    monkeypatch.setattr(plan, "make_launch_plan", make)
    auto = LaunchRequest("m")
    found = plan.plan_with_transport(auto, Path(), [], "nccl", "because")
    assert found[1:] == ("ring", "NCCL is for tensor parallelism only: 64 heads and 3 ranks")
    outcomes["nccl"] = FakePlan(fits=False)
    assert plan.plan_with_transport(auto, Path(), [], "nccl", "because")[1] == "ring"
    asked.clear()
    outcomes["nccl"] = FakePlan(fits=True)
    assert plan.plan_with_transport(auto, Path(), [], "nccl", "because")[1:] == ("nccl", "because")
    assert asked == ["nccl"]
    outcomes["nccl"] = UsageError("64 heads and 3 ranks")
    with pytest.raises(UsageError, match="64 heads"):
        plan.plan_with_transport(LaunchRequest("m", transport="nccl"), Path(), [], "nccl", "")


def test_a_plan_over_nccl_is_for_gpus_and_slices() -> None:
    macs = parse_hardware("2x m3-ultra-512")
    with pytest.raises(UsageError, match="computes with metal"):
        PlanRequest(transport="nccl").check(macs)
    with pytest.raises(UsageError, match="no pipeline"):
        PlanRequest(transport="nccl", strategy="pipeline").check(macs)
    assert PlanRequest(transport="nccl").strategies(2) == ["tensor"]
    assert PlanRequest(transport="ring").strategies(2) == ["pipeline", "tensor"]


def test_the_hint_for_heads_that_nccl_cannot_share_is_not_refused_in_turn(toy_k2: Path) -> None:
    command = ["plan-memory", str(toy_k2), "--hardware", "3x h200-141"]
    with pytest.raises(UsageError, match="3 ranks cannot share") as refused:
        run_command_line([*command, "--backend", "nccl"])
    assert refused.value.hint == "--backend ring --parallel pipeline"
    run_command_line([*command, *refused.value.hint.split()])


def _assignment(rank: int = 0, **fields: Any) -> Assignment:
    return make_assignment(
        rank=rank, size=2, nodes=["localhost"] * 2, transport="nccl", strategy="tensor", **fields
    )


def test_variables_of_a_rank() -> None:
    assignment = _assignment(1, nccl_coordinator="127.0.0.1:5000", nccl_interface="lo")
    values, files = group_settings(assignment)
    assert files == {}
    assert values == {
        "MLX_RANK": "1",
        "MLX_WORLD_SIZE": "2",
        "NCCL_HOST_IP": "127.0.0.1",
        "NCCL_PORT": "5000",
        "NCCL_SOCKET_IFNAME": "=lo",
        "NCCL_RAS_ENABLE": "0",
        "NCCL_SOCKET_FAMILY": "AF_INET",
    }


def test_the_next_attempt_gets_another_port() -> None:
    before = Bootstrap(
        _assignment(nccl_coordinator="127.0.0.1:5000", nccl_interface="lo"),
        "5e" * 32, "127.0.0.1", 1, "demo",
    )  # fmt: skip
    (after,) = renew_bootstraps([before], lambda name, count: list(range(6000, 6000 + count)), None)
    assert after.assignment.nccl_coordinator == "127.0.0.1:6001"
    assert after.assignment.jaccl_coordinator is None


def test_it_listens_on_loopback_or_on_the_addresses_of_the_cluster() -> None:
    assert nccl_route(_nodes(2), ["127.0.0.1"] * 2) == NcclRoute("127.0.0.1", ["lo", "lo"])
    networks = (Network("ib0", "10.0.0.1", "10.0.0.0/24"), Network("eth0", "1.2.3.4", "1.2.3.0/24"))
    a = cast("Node", GpuNode(Nccl(1), "a", networks=networks))
    b = cast("Node", GpuNode(Nccl(1), "b", networks=(Network("ib7", "10.0.0.2", "10.0.0.0/24"),)))
    assert nccl_route([a, b], ["10.0.0.1", "10.0.0.2"]) == NcclRoute("10.0.0.1", ["ib0", "ib7"])
    with pytest.raises(ClusterError, match="not an IPv4 address of b"):
        nccl_route([a, b], ["10.0.0.1", "10.0.0.9"])


def test_one_rank_says_that_a_transport_is_not_used() -> None:
    assert check_nodes([HERE], "nccl", lambda _: None, force=False) == (
        "local",
        "one rank needs no transport, so --backend nccl is not used",
    )
    assert check_nodes([HERE], "auto", lambda _: None, force=False) == (
        "local",
        "one rank needs no transport",
    )
