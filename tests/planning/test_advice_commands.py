"""Advice as a user follows it: every command that a plan prints is run, and must exit with 0."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import msgspec
import pytest

from k2cli.cluster.description import Cluster, ClusterNode
from k2cli.units import GIB
from tests.planning.commands import k2_here

CONFIGS = Path(__file__).resolve().parents[2] / "k2cli" / "models" / "configs"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """K2 with six layers, in 4 bits (57 GB) and as its fp8 original (186 GB in bfloat16)."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("k2-instruct-4bit", "k2-instruct"):
        config = json.loads((CONFIGS / name / "config.json").read_text())
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    return folder


def advised(output: str) -> list[list[str]]:
    """Return the commands of a plan's advice, with their continuation lines joined."""
    joined = output.replace(" \\\n", " ")
    lines = [line for line in joined.splitlines() if re.match(r" +k2 plan-memory ", line)]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize(
    ("model", "options", "pieces"),
    [
        ("k2-instruct-4bit", "--hardware m4-max-36", 2),
        ("k2-instruct-4bit", "--hardware m4-max-64 --parallel single --concurrency 16", 4),
        ("k2-instruct-4bit", "--hardware '2x m4-max-48' --context 131072 --concurrency 40", 3),
        ("k2-instruct-4bit", "--hardware '2x m4-max-36:limit=24GiB' --parallel tensor", 2),
        ("k2-instruct-4bit", "--hardware m4-max-64 --chunk 16384 --context 16384", 2),
        ("k2-instruct-4bit", "--cluster home --context 131072 --concurrency 20", 2),
        ("k2-instruct", "--hardware m4-max-128 --context 100000", 2),
        ("k2-instruct", "--hardware m4-max-36 --parallel single", 1),
        ("k2-instruct", "--hardware 'm4-max-64 + m4-max-36' --quantize 8bit", 1),
        ("k2-instruct", "--hardware m1-16", 0),
    ],
)
def test_every_advised_command_plans_what_fits(
    models: Path, tmp_path: Path, model: str, options: str, pieces: int
) -> None:
    mac = ClusterNode(
        "attic", chip="Apple M4 Max", memory_bytes=64 * GIB, limit_bytes=60 * GIB,
        limit_mark="exact", device="metal", bandwidth_bytes_per_second=546_000_000_000,
    )  # fmt: skip
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "home.json").write_bytes(msgspec.json.encode(Cluster("home", (mac,))))
    asked = ["plan-memory", str(models / model), *shlex.split(options)]
    done = k2_here(*asked, K2_CONFIG_DIR=str(tmp_path))
    assert done.returncode == 3
    commands = advised(done.stdout)
    assert len(commands) >= pieces, done.stdout
    for command in commands:
        again = k2_here(*command, K2_CONFIG_DIR=str(tmp_path))
        assert again.returncode == 0, (command, again.stdout, again.stderr)
