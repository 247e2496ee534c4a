"""``k2 plan-memory`` from outside: transcripts, exit codes, streams."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from k2cli.cluster.description import Cluster, ClusterNode
from k2cli.planning.plan import plan_from_json
from k2cli.units import GIB
from tests.planning.commands import ROOT, k2_here

PLANS = ROOT / "tests" / "data" / "plans"
K2 = "tests/data/configs/k2-mlx-4bit"


def k2(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program from the repository's root, where relative paths of the transcripts hold."""
    return subprocess.run(
        [sys.executable, "-m", "k2cli", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


def without_speeds(text: str) -> str:
    """Predicted figures change with the fit of the speed model; everything else is held."""
    text = re.sub(r"sooner\s+done.*?\(predicted\)", "sooner", text, flags=re.DOTALL)
    text = re.sub(r"(speed, and what it is made of\n).*?\n\n", r"\1\n", text, flags=re.DOTALL)
    text = re.sub(r"^((?:decode|prefill|first token) ).*(?=  )", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^(  (?:tensor|pipeline) .*B) .*", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"[\d.,]+(?= (?:s|tokens/s|times)\b)", "#", text)


@pytest.mark.parametrize(
    ("transcript", "arguments", "exit_code"),
    [
        ("two-m3-ultra", ["--hardware", "2x m3-ultra-512", "--context", "131072"], 0),
        ("one-m3-ultra", ["--hardware", "m3-ultra-512", "--explain"], 3),
        ("four-sequences", ["--hardware", "2x m3-ultra-512", "--concurrency", "4", "--explain"], 0),
        (
            "uneven",
            ["--hardware", "m3-ultra-512 + m3-ultra-256", "--parallel", "pipeline"],
            0,
        ),
        ("tensor-four", ["--hardware", "4x m2-ultra-192", "--parallel", "tensor"], 0),
    ],
)
def test_transcript(transcript: str, arguments: list[str], exit_code: int) -> None:
    done = k2_here("plan-memory", K2, *arguments)
    expected = (PLANS / f"{transcript}.txt").read_text(encoding="utf-8")
    assert without_speeds(done.stdout) == without_speeds(expected)
    assert done.returncode == exit_code
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_json_is_on_stdout_whether_it_fits_or_not(tmp_path: Path) -> None:
    for hardware, exit_code in (("2x m3-ultra-512", 0), ("m3-ultra-512", 3)):
        saved = tmp_path / "plan.json"
        done = k2_here(
            "plan-memory", K2, "--hardware", hardware, "--json", "--save", str(saved)
        )  # fmt: skip
        assert done.returncode == exit_code
        plan = json.loads(done.stdout)
        assert plan["schema_version"] == 1
        assert plan["fits"] is (exit_code == 0)
        assert plan_from_json(saved.read_bytes(), "plan.json").fits is plan["fits"]
        assert ("does not fit" in done.stderr) is (exit_code == 3)
        assert set(plan) >= {"model", "request", "placement", "nodes", "marks"}
        assert set(plan["nodes"][0]) >= {
            "name", "memory_bytes", "limit_bytes", "weights_bytes", "kv_cache_bytes",
            "activation_bytes", "overhead_bytes", "total_bytes", "headroom_bytes",
        }  # fmt: skip


def test_the_machines_of_a_cluster_are_planned_in_their_order(tmp_path: Path) -> None:
    macs = [
        ClusterNode(
            name, chip="Apple M3 Ultra", memory_bytes=memory * GIB,
            limit_bytes=memory * GIB * 9 // 10, limit_mark="exact", device="metal",
            bandwidth_bytes_per_second=819_000_000_000,
        )
        for name, memory in (("attic", 256), ("cellar", 512))
    ]  # fmt: skip
    folder = tmp_path / "clusters"
    folder.mkdir()
    (folder / "home.json").write_bytes(msgspec.json.encode(Cluster("home", tuple(macs))))
    done = k2_here("plan-memory", K2, "--cluster", "home", "--json", K2_CONFIG_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [part["node"] for part in plan["placement"]["ranks"]] == ["attic", "cellar"]
    assert plan["marks"]["limit_bytes"] == "exact"
    assert plan["speed"]["decode_tokens_per_second"]["expected"] > 1


def test_the_default_is_this_machine_and_a_hint_comes_on_stderr(toy_k2: Path) -> None:
    done = k2_here("plan-memory", str(toy_k2))
    assert done.returncode == 0
    assert "on localhost" in done.stdout
    assert f"next: k2 launch {toy_k2}" in done.stderr


def test_the_proposed_launch_has_the_options_of_the_plan(toy_k2: Path) -> None:
    options = ["--parallel", "pipeline", "--context", "1024", "--concurrency", "1"]
    others = ["--hardware", "2x this", "--chunk", "256", "--dtype", "auto", "--explain"]
    done = k2_here("plan-memory", str(toy_k2), *options, *others)
    proposed = f"next: k2 launch {toy_k2} --nodes localhost,localhost {' '.join(options)}"
    assert proposed in done.stderr.splitlines(), done.stderr


def test_a_prompt_that_the_context_does_not_hold_is_told(toy_k2: Path) -> None:
    """Placements are compared by a shorter one, which may be another placement."""
    lengths = ["--context", "1k", "--prompt-tokens", "2k", "--answer-tokens", "100"]
    done = k2_here("plan-memory", str(toy_k2), *lengths)
    assert (
        "a context of 1,024 tokens does not hold a prompt of 2,048 with an answer of 100: "
        "placements are compared by 924 and 100; --context 2148 would hold it"
    ) in " ".join(done.stderr.split())
    assert "does not hold" not in k2_here("plan-memory", str(toy_k2), *lengths[:2]).stderr


def test_two_ranks_of_one_machine_fit_80_columns(toy_k2: Path) -> None:
    done = k2_here("plan-memory", str(toy_k2), "--hardware", "2x this", "--concurrency", "200")
    assert "localhost rank 1" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_terminal_without_utf8_gets_ascii_bars() -> None:
    done = k2("plan-memory", K2, "--hardware", "2x m3-ultra-512", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "# weights" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([K2, "--hardware", "0x m3-ultra-512"], "names 0 machines"),
        ([K2, "--context", "999999"], "999,999 tokens is beyond"),
        (["no/such/folder"], "no/such/folder"),
        ([K2, "--context", "many"], "--context"),
        (
            [K2, "--hardware", "2x m3-ultra-512", "--save", "/no/such/folder/plan.json"],
            "cannot be written",
        ),
    ],
)
def test_mistakes_are_usage_errors(arguments: list[str], told: str) -> None:
    done = k2_here("plan-memory", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (None, "has no .safetensors files"),
        ("pytorch_model.bin", "only pickled weights: pytorch_model.bin"),
        ("consolidated.safetensors", "only Mistral's own layout: consolidated.safetensors"),
        ("model.gguf", "but GGUF files: model.gguf"),
    ],
)
def test_a_folder_that_a_launch_refuses_is_planned_with_a_warning(
    file: str | None, why: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((ROOT / K2 / "config.json").read_text())
    if file is not None:
        (tmp_path / file).write_bytes(b"")
    done = k2("plan-memory", str(tmp_path), "--hardware", "2x m3-ultra-512")
    assert done.returncode == 0, done.stderr
    assert "a launch refuses this folder" in done.stderr
    assert why in " ".join(done.stderr.split())
    assert "next: k2 launch" not in done.stderr


def test_no_launch_is_proposed_of_a_folder_without_a_tokenizer(
    toy_k2: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "toy"
    shutil.copytree(toy_k2, folder, ignore=shutil.ignore_patterns("tiktoken.model"))
    done = k2_here("plan-memory", str(folder))
    assert done.returncode == 0, done.stderr
    assert f"a launch refuses this folder: {folder} has neither tokenizer.json" in done.stderr
    assert "next:" not in done.stderr
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "tiktoken.model").write_text(pointer)
    done = k2_here("plan-memory", str(folder))
    assert "a launch refuses this folder" in done.stderr
    assert "Git LFS" in done.stderr


def test_a_checkpoint_of_another_quantizer_is_named_with_its_folder(tmp_path: Path) -> None:
    config = json.loads((ROOT / K2 / "config.json").read_text())
    del config["quantization"]
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = k2_here("plan-memory", str(tmp_path), "--hardware", "2x m3-ultra-512")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"{tmp_path}/config.json has quantization_config.quant_method 'gptq'" in said
