"""Parts of a checkpoint: which files a node gets, and what can be done with a part."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from k2cli.agent.model import checkpoint_digest, find_checkpoint
from k2cli.agent.weights.messages import ANOTHER_SIZE, Lacks
from k2cli.agent.weights.model_files import model_files
from k2cli.errors import ClusterError, K2Error
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.part import FOLDER, write_part_list
from k2cli.models.reference import local_checkpoint
from k2cli.nodes.local import LocalNode
from k2cli.protocol import Assignment
from k2cli.rank.loader import LoadedPart, load_part
from k2cli.sharding.placement import Placement, RankPlacement
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.trace import parameters, trace_rank
from k2cli.transfer.needs import find_needs
from k2cli.transfer.parts import files_of_nodes, share_of
from k2cli.transfer.request import PushRequest
from tests.support.weights import in_many_files

PIPELINE = Placement("pipeline", (RankPlacement(0, "a", (2, 5)), RankPlacement(1, "b", (0, 2))))


@pytest.fixture(scope="module")
def whole(toy_k2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_many_files(toy_k2, tmp_path_factory.mktemp("many") / "toy")


def _part(whole: Path, folder: Path, wanted: frozenset[str]) -> Path:
    """Make the folder that a push of these files would make."""
    share = share_of(model_files(str(whole)), wanted)
    (folder / FOLDER).mkdir(parents=True)
    for file in share.files:
        data = (whole / share.sources.get(file.name, file.name)).read_bytes()
        (folder / file.name).write_bytes(data[: file.nbytes])
    write_part_list(folder, share.absent)
    return folder


def test_each_node_gets_the_files_of_its_layers(whole: Path) -> None:
    checkpoint = read_checkpoint(whole)
    found = files_of_nodes(checkpoint, PIPELINE, ["a", "b"])
    files = {name: tensor.file.name for name, tensor in checkpoint.tensors.items()}
    assert found["a"] | found["b"] == set(files.values())
    assert len(found["a"] & found["b"]) < 3
    for name, file in files.items():
        parts = name.split(".")
        first = parts[1] == "embed_tokens" or (parts[1] == "layers" and int(parts[2]) < 2)
        assert file in found["b" if first else "a"], name
    tensor = Placement("tensor", tuple(RankPlacement(r, "ab"[r], (0, 5)) for r in (0, 1)))
    for names in files_of_nodes(checkpoint, tensor, ["a", "b"]).values():
        assert names == set(files.values())
    one = files_of_nodes(checkpoint, PIPELINE, ["a", "a"])
    assert one == {"a": set(files.values())}


def test_a_part_counts_as_the_whole_checkpoint_for_a_launch_alone(
    whole: Path, tmp_path: Path
) -> None:
    wanted = files_of_nodes(read_checkpoint(whole), PIPELINE, ["a", "b"])["b"]
    part = _part(whole, tmp_path / "toy", wanted)
    assert checkpoint_digest(part) == checkpoint_digest(whole)
    copy = find_checkpoint(str(part), str(part))
    names = {path.name for path in whole.glob("*.safetensors")}
    assert copy.absent.keys() == names - wanted
    assert read_checkpoint(part).stored_bytes == read_checkpoint(whole).stored_bytes
    with pytest.raises(K2Error, match="only the part that a launch needs here"):
        local_checkpoint(str(part))
    # A part can be sent on as the part that it is.
    again = share_of(model_files(str(part)), wanted)
    assert again.absent == copy.absent
    # Once the other files are there too, it is a whole model.
    for name in copy.absent:
        shutil.copy(whole / name, part)
    assert local_checkpoint(str(part)) == part
    assert not read_checkpoint(part).absent


def test_a_rank_loads_its_part_and_never_zeros_in_place_of_another(
    whole: Path, tmp_path: Path
) -> None:
    wanted = files_of_nodes(read_checkpoint(whole), PIPELINE, ["a", "b"])["b"]
    part = _part(whole, tmp_path / "toy", wanted)

    def load(folder: Path, rank: int) -> LoadedPart:
        assignment = Assignment(
            run_id="x",
            rank=rank,
            size=2,
            transport="ring",
            nodes=["a", "b"],
            layers=[part.layers for part in PIPELINE.ranks],
            strategy="pipeline",
            head="replicated",
            model_path=str(folder),
            dtype="float32",
            context_length=512,
            concurrency=1,
            prefill_chunk_tokens=64,
            expected_weights_bytes=_expected(folder),
        )
        return load_part(assignment, StandInGroup(rank, 2), lambda done, total: None)

    loaded, reference = load(part, 1), load(whole, 1)
    mine, other = (parameters(each.stage.model) for each in (loaded, reference))
    assert mine.keys() == other.keys()
    assert all(bool((mine[name] == other[name]).all()) for name in mine)
    with pytest.raises(K2Error, match="not brought to"):
        load(part, 0)


def _expected(folder: Path) -> list[int]:
    checkpoint = read_checkpoint(folder)
    stored = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    return [
        sum(
            value.nbytes
            for value in parameters(
                trace_rank(checkpoint.config, PIPELINE, rank, stored=stored, dtype="float32").model
            ).values()
        )
        for rank in (0, 1)
    ]


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"sizes": {"../x": 9}}', '{"sizes": {"a": -1}}', '{"sizes": {"a": "b"}}']
)
def test_a_damaged_list_of_a_part_is_told(whole: Path, tmp_path: Path, text: str) -> None:
    part = _part(whole, tmp_path / "toy", frozenset({"model-00001-of-00018.safetensors"}))
    (part / FOLDER / "files.json").write_text(text)
    with pytest.raises(K2Error, match="is damaged"):
        read_checkpoint(part)


def test_room_and_other_contents_are_judged_before_anything_is_sent(whole: Path) -> None:
    found = model_files(str(whole))
    request = PushRequest(str(whole), LocalNode(), found, ())
    share = share_of(found, None)
    index = next(i for i, f in enumerate(share.files) if f.name == "config.json")
    full = Lacks("/m", {index: (0,)}, 10**9, 10**6)
    with pytest.raises(ClusterError, match=r"node b has 1\.0 MB free for /m, .* needs 1\.0 GB"):
        find_needs(request, "b", share, full)
    other = Lacks("/m", {}, 0, 10**12, {index: "0" * 64})
    with pytest.raises(ClusterError, match=r"node b has another config\.json in /m"):
        find_needs(request, "b", share, other)
    sized = Lacks("/m", {}, 0, 10**12, {index: ANOTHER_SIZE})
    with pytest.raises(ClusterError, match=r"node b has another config\.json in /m"):
        find_needs(request, "b", share, sized)
    replacing = PushRequest(str(whole), LocalNode(), found, (), replace=True)
    assert find_needs(replacing, "b", share, sized).replaced == (index,)
    digest = hashlib.sha256((whole / "config.json").read_bytes()).hexdigest()
    same = find_needs(request, "b", share, Lacks("/m", {}, 0, 10**12, {index: digest}))
    assert (same.same, same.replaced, same.missing) == ((index,), (), {})
