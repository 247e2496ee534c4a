"""Test the source of a plan: a node's headers give the plan of its whole checkpoint."""

from __future__ import annotations

import json
import shutil
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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tiktoken.model", POINTER, "tiktoken.model is a Git LFS pointer"),
        ("tokenizer.json", POINTER, "tokenizer.json is a Git LFS pointer"),
        ("chat_template.jinja", POINTER, "chat_template.jinja is a Git LFS pointer"),
        ("tokenizer_config.json", POINTER, "tokenizer_config.json is a Git LFS pointer"),
        ("tiktoken.model", None, "has neither tokenizer.json nor tiktoken.model"),
        ("generation_config.json", '{"eos_token_id": [1024]}', None),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
    ],
)
def test_the_launcher_finds_text_files_that_cannot_be_used(
    toy_k2: Path, tmp_path: Path, name: str, text: str | None, said: str | None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_k2, folder)
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)
    here = LocalNode()
    if said is None:  # config.json names one that the model has
        with locate_model(str(folder), [here]):
            return
    with pytest.raises(K2Error, match=said), locate_model(str(folder), [here]):
        pass
    with locate_model(str(folder), [Far("a", folder)]):  # the leader's machine has its own
        pass


def test_the_launcher_finds_end_tokens_that_no_answer_can_have(
    toy_k2: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_k2, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [5000]}))
    (folder / "generation_config.json").unlink()
    said = r"config.json: eos_token_id is 5000, but the model has 1024 tokens"
    with pytest.raises(K2Error, match=said), locate_model(str(folder), [LocalNode()]):
        pass
