"""What a launch plans from: headers of a node's checkpoint are as good as the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from k2cli.agent.model import checkpoint_digest
from k2cli.errors import ClusterError, K2Error
from k2cli.launch.model_copies import model_folders
from k2cli.launch.model_source import ModelHere, model_here
from k2cli.nodes.local import LocalNode
from tests.planning.plans import make_plan


class Far(LocalNode):
    """A node in whose view /far is a folder of this machine."""

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
    with model_here(reference, nodes) as here:
        assert (here.lender, here.folder.name) == ("a", toy_k2.name)
        assert checkpoint_digest(here.folder) == checkpoint_digest(toy_k2)
        weights = sorted(here.folder.glob("*.safetensors"))
        assert [path.stat().st_size for path in weights] == [
            path.stat().st_size for path in sorted(toy_k2.glob("*.safetensors"))
        ]
        # Holes: no weights have come here.
        assert sum(path.stat().st_blocks * 512 for path in weights) < 200_000
        memory = [nodes[0].memory()] * 2
        lent, own = (make_plan(str(path), memory).nodes for path in (here.folder, toy_k2))
        assert lent == own
        assert model_folders(nodes, reference, here) == dict.fromkeys("ab", str(toy_k2))
        nodes[1] = Far("b", toy_k2)
        with pytest.raises(ClusterError, match=f"node b cannot load {reference}: ") as raised:
            model_folders(nodes, reference, here)
        assert raised.value.hint == f"ssh a rsync -a {toy_k2}/ b:{toy_k2}/"
    assert not here.folder.exists()


def test_a_model_of_this_machine_is_taken_as_it_is(toy_k2: Path) -> None:
    with model_here(str(toy_k2), [Far("a", toy_k2)]) as here:
        assert here == ModelHere(toy_k2.resolve())


def test_a_model_that_is_nowhere_is_named_with_what_the_node_says(tmp_path: Path) -> None:
    with (
        pytest.raises(ClusterError, match="demo is not on this machine, and node a says: model"),
        model_here("demo", [Far("a", tmp_path)]),
    ):
        pass
    with pytest.raises(K2Error, match="is not on this machine") as raised:
        model_here("demo", [LocalNode(), Far("a", tmp_path)]).__enter__()
    assert raised.value.hint == "k2 download demo"
