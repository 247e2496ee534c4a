"""Test the source of a plan: a node's headers give the plan of its whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from k2cli.agent.model import checkpoint_digest
from k2cli.errors import ClusterError, K2Error
from k2cli.launch.model_copies import find_model_copies
from k2cli.launch.model_source import ModelSource, locate_model
from k2cli.nodes.local import LocalNode
from tests.planning.plans import make_plan


class Far(LocalNode):
    """A node on which /far stands for a folder of this machine."""

    is_local = False

    def __init__(self, name: str, real: Path) -> None:
        self.name = name
        self._real = real

    def ask(self, kind: Any, verb: str, *arguments: str, input: bytes | None = None) -> Any:
        seen = [argument.replace("/far", str(self._real)) for argument in arguments]
        return super().ask(kind, verb, *seen, input=input)


def test_headers_of_the_first_node_make_the_plan_of_its_checkpoint(toy_k2: Path) -> None:
    nodes = [Far("a", toy_k2.parent), Far("b", toy_k2.parent)]
    reference = f"/far/{toy_k2.name}"
    with locate_model(reference, nodes) as source:
        assert (source.source_node, source.folder.name) == ("a", toy_k2.name)
        assert checkpoint_digest(source.folder) == checkpoint_digest(toy_k2)
        weights = sorted(source.folder.glob("*.safetensors"))
        assert [path.stat().st_size for path in weights] == [
            path.stat().st_size for path in sorted(toy_k2.glob("*.safetensors"))
        ]
        # The files are sparse: no weights were sent.
        assert sum(path.stat().st_blocks * 512 for path in weights) < 200_000
        memory = [nodes[0].memory()] * 2
        sent, own = (make_plan(str(path), memory).nodes for path in (source.folder, toy_k2))
        assert sent == own
        assert find_model_copies(nodes, reference, source) == dict.fromkeys("ab", str(toy_k2))
        nodes[1] = Far("b", toy_k2)
        with pytest.raises(ClusterError, match=r"node b lacks [\d.]+ MB \(.*no folder") as raised:
            find_model_copies(nodes, reference, source)
        assert raised.value.hint is not None
        assert raised.value.hint.startswith(f"k2 models push {reference} b --from a, or ")
    assert not source.folder.exists()


def test_a_model_of_this_machine_is_taken_as_it_is(toy_k2: Path) -> None:
    with locate_model(str(toy_k2), [Far("a", toy_k2)]) as source:
        assert source == ModelSource(toy_k2.resolve())


def test_a_model_that_is_nowhere_is_named_with_what_the_node_says(tmp_path: Path) -> None:
    with (
        pytest.raises(ClusterError, match="demo is not on this machine, and node a says: model"),
        locate_model("demo", [Far("a", tmp_path)]),
    ):
        pass
    with pytest.raises(K2Error, match="is not on this machine") as raised:
        locate_model("demo", [LocalNode(), Far("a", tmp_path)]).__enter__()
    assert raised.value.hint == "k2 download demo"
