"""Plans as documents: JSON against its schema, the picture, the plot, colours."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

from tests.commands.test_plan_memory import K2, k2
from tests.planning.commands import ROOT, k2_here

REFERENCE = ROOT / "docs" / "reference"


def test_schemas_are_those_of_the_types() -> None:
    done = subprocess.run([sys.executable, "scripts/plan-schema", "--check"], cwd=ROOT, timeout=60)
    assert done.returncode == 0, "run scripts/plan-schema"


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--hardware", "2x m3-ultra-512", "--context", "131072"], 0),
        (["--hardware", "2x m3-ultra-512", "--concurrency", "900"], 3),
        (["--hardware", "this"], 3),
    ],
)
def test_json_is_as_its_schema_says(arguments: list[str], exit_code: int) -> None:
    done = k2_here("plan-memory", K2, "--json", *arguments)
    assert done.returncode == exit_code
    plan = json.loads(done.stdout)
    schema = json.loads((REFERENCE / "plan.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(plan, schema)
    assert plan["fits"] == (exit_code == 0)
    assert (plan["max_context_length"] > 0) == plan["fits"] or plan["advice"]
    if "this" not in arguments:
        band = plan["speed"]["decode_tokens_per_second"]
        assert 0 < band["low"] <= band["expected"] <= band["high"] <= 2.01 * band["low"]


def test_the_shops_json_is_as_its_schema_says() -> None:
    done = k2_here("plan-memory", K2, "--shop", "--json")
    assert done.returncode == 0
    schema = json.loads((REFERENCE / "shop.schema.json").read_text())
    jsonschema.validate(json.loads(done.stdout), schema)


@pytest.fixture
def odd_name(tmp_path: Path) -> Path:
    """K2's config in a folder whose name is markup."""
    folder = tmp_path / '<script>&"k2"'
    folder.mkdir()
    (folder / "config.json").write_bytes((ROOT / K2 / "config.json").read_bytes())
    return folder


def test_the_picture_is_whole_and_needs_nothing_beside_it(odd_name: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    for hardware, exit_code in (("2x m3-ultra-512", 0), ("m3-ultra-512", 3)):
        done = k2_here("plan-memory", str(odd_name), "--hardware", hardware, "--svg", str(path))
        assert done.returncode == exit_code
        root = ElementTree.parse(path).getroot()
        kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert kinds == {"svg", "title", "rect", "text", "line", "polygon", "polyline"}
        assert not [e for e in root.iter() if any("href" in name for name in e.attrib)]
        written = [element.text or "" for element in root.iter()]
        assert any('<script>&"k2"' in text for text in written)
        assert any("fits, with" in text or "does not fit" in text for text in written)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_everything_together_is_readable_at_80_columns(encoding: str) -> None:
    done = k2(
        "plan-memory", K2, "--hardware", "2x m3-ultra-512", "--concurrency", "4", "--explain",
        "--plot", PYTHONIOENCODING=encoding,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert done.stdout.isascii() == (encoding == "ascii")
    assert "\x1b" not in done.stdout
    assert "memory of the tightest node" in done.stdout
    assert "predicted decode speed" in done.stdout


def test_a_terminal_gets_colours() -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "k2cli", "plan-memory", K2, "--hardware", "4x m3-ultra-512"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=follower, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the terminal is closed by its last user
                break
            if not part:
                break
            shown += part
        assert process.wait(timeout=60) == 0
    os.close(leader)
    assert b"\x1b[34m" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shop", "--hardware", "this"], "--hardware cannot be used with --shop"),
        (["--hardware", "this", "--cluster", "home"], "both name machines"),
        (["--cluster", "nowhere"], "no cluster 'nowhere'"),
        (["--collective-latency", "26"], "'26' is not a latency"),
        (["--collective-latency", "5s"], "at most 1 s, not 5 s"),
        (["--backend", "carrier-pigeon"], "'carrier-pigeon' is not one of"),
        (["--chunk", "0"], "--chunk 0 is too small: the minimum is 1"),
        (
            ["--svg", "/no/such/folder/plan.svg", "--hardware", "2x m3-ultra-512"],
            "cannot be written",
        ),
    ],
)
def test_mistakes_with_the_new_options_are_usage_errors(arguments: list[str], told: str) -> None:
    done = k2_here("plan-memory", K2, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stdout == ""
