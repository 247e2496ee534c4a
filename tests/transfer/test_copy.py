"""The copy to a node without k2: the node's own files stay until they may be replaced."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from k2cli.agent.weights.messages import ModelFiles, Target, WeightsFile
from k2cli.errors import ClusterError
from k2cli.nodes.local import LocalNode
from k2cli.nodes.node import Node
from k2cli.transfer import copy
from k2cli.transfer.request import PushRequest

NEW, OLD = b'{"model_type": "llama"}', b'{"the user": "wrote this"}'


def test_a_nodes_own_file_stays_until_the_new_one_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    for folder, data in ((source, NEW), (there, OLD)):
        folder.mkdir()
        (folder / "config.json").write_bytes(data)
    damaged = False

    def copy_file(program: list[str], path: Path, node: Node, place: str, nbytes: int) -> None:
        assert (there / "config.json").read_bytes() == OLD
        shutil.copy(path, place)
        if damaged:
            Path(place).write_bytes(b"x" * nbytes)

    monkeypatch.setattr(copy, "_copy_file", copy_file)
    files = (WeightsFile("config.json", len(NEW)),)
    found = ModelFiles(str(source), Target("path", str(there)), files, {}, {})
    request = PushRequest("m", LocalNode(), found, ())
    with pytest.raises(ClusterError, match=r"has another config\.json") as refused:
        copy.copy_to(request, LocalNode(), lambda event: None)
    assert refused.value.hint is not None
    assert "--replace" in refused.value.hint
    replacing, damaged = replace(request, replace=True), True
    with pytest.raises(ClusterError, match="differs from"):
        copy.copy_to(replacing, LocalNode(), lambda event: None)
    assert (there / "config.json").read_bytes() == OLD
    damaged = False
    assert copy.copy_to(replacing, LocalNode(), lambda event: None).sent_bytes == len(NEW)
    assert [path.name for path in there.iterdir()] == ["config.json"]
    assert (there / "config.json").read_bytes() == NEW
    again = copy.copy_to(request, LocalNode(), lambda event: None)
    assert (again.sent_bytes, again.was_there_bytes) == (0, len(NEW))
