"""What a push is asked for: nodes, a cluster, and the command that continues it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from k2cli.agent.weights.model_files import model_files
from k2cli.cluster.description import Cluster, ClusterNode, save_cluster
from k2cli.commands.models.download_to import Wishes, download_to_cluster
from k2cli.errors import UsageError
from k2cli.nodes.local import LocalNode
from k2cli.settings import data_directory
from k2cli.transfer.choose_push import choose_push
from k2cli.transfer.push import resume_command
from k2cli.transfer.request import PushRequest


def test_the_command_that_continues_can_be_copied(toy_k2: Path) -> None:
    options = ("--plan", "my plan.json", "--replace")
    request = PushRequest(
        "/disk two/model", LocalNode(), model_files(str(toy_k2)), (LocalNode(),),
        over="ssh", options=options,
    )  # fmt: skip
    wanted = ["k2", "models", "push", "/disk two/model", "localhost", *options, "--over", "ssh"]
    assert shlex.split(resume_command(request)) == wanted


def test_a_push_without_a_node_names_the_model_in_its_hint(toy_k2: Path) -> None:
    with pytest.raises(UsageError, match="no node is named") as raised:
        choose_push(str(toy_k2), [])
    assert raised.value.hint == f"k2 models push {toy_k2} NODE"


def test_an_unknown_cluster_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(UsageError, match="there is no cluster 'nope'"):
        download_to_cluster("demo", "nope", None, Wishes(), alone={}, as_json=False)
    assert not data_directory().exists()


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("--to", "/x", "k2 download demo --to /x && k2 models push /x --cluster pair"),
        ("--xet", True, "k2 download demo --xet && k2 models push demo --cluster pair"),
        ("--events", True, "leave --events out"),
    ],
)
def test_an_option_for_this_machine_alone_says_what_to_run(
    option: str, value: object, instead: str
) -> None:
    with pytest.raises(UsageError, match=f"{option} is for a download to this machine") as caught:
        download_to_cluster("demo", "pair", None, Wishes(), alone={option: value}, as_json=False)
    assert caught.value.hint == instead


def test_files_are_chosen_only_of_a_repository(toy_k2: Path) -> None:
    save_cluster(Cluster("pair", (ClusterNode("localhost"), ClusterNode("b"))))
    wishes = Wishes(only=["config"])
    with pytest.raises(UsageError, match="only of a repository of the Hub"):
        download_to_cluster(str(toy_k2), "pair", None, wishes, alone={}, as_json=False)
    with pytest.raises(UsageError, match="--limit-rate '1' is below"):
        download_to_cluster(
            str(toy_k2), "pair", None, Wishes(limit_rate="1"), alone={}, as_json=False
        )
