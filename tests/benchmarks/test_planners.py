"""Unit tests of the comparison of planners: what it reads in their outputs, and its table."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from urllib.request import Request, urlopen

from benchmarks.planners.hub import local_hub
from benchmarks.planners.main import GIB, KV_BYTES, PLANNERS, Answer, found, measure, table
from k2cli.models.safetensors_writer import TensorSpec, into_shards, safetensors_header

MODELINFO = """VRAM (est):      ~752.01 GB Total Minimum Required
                   ├─ Weights:    537.93 GB
                   ├─ KV Cache:   213.5 GB (131072 tokens)
"""


def test_sizes_are_read_with_their_units() -> None:
    modelinfo = next(planner for planner in PLANNERS if planner.package == "modelinfo-cli")
    assert found(modelinfo.weights, MODELINFO) == round(537.93 * GIB)
    assert found(modelinfo.cache, MODELINFO) == round(213.5 * GIB)
    assert found(modelinfo.cache, "no figures") is None


def test_a_child_is_measured_with_its_own_status_output_and_memory() -> None:
    code = "x = bytearray(80_000_000); print('held'); raise SystemExit(3)"
    status, text, seconds, _, peak = measure([sys.executable, "-c", code], {})
    assert (status, text) == (3, "held\n")
    assert seconds > 0
    assert peak > 80_000_000


def test_table_has_errors_and_reasons() -> None:
    answers = [
        Answer("good", 1.0, 0.5, 100_000_000, 1000, KV_BYTES * 2),
        Answer("bad", reason="no"),
    ]
    text = table(answers, 1000)
    assert "| good | 1.00 | 0.50 | 100 | 0.0 | 18.4 (+100%) |" in text
    assert text.endswith("- bad: no")


def test_hub_serves_ranges_and_counts_elements(tmp_path: Path) -> None:
    header = safetensors_header([TensorSpec("a", "BF16", (3, 2))])
    (tmp_path / "model.safetensors").write_bytes(header + bytes(12))
    (tmp_path / "config.json").write_text("{}")
    with local_hub(tmp_path) as address:
        url = f"{address}/mock/model/resolve/main/model.safetensors"
        with urlopen(Request(url, headers={"Range": "bytes=0-7"}), timeout=5) as answer:
            assert struct.unpack("<Q", answer.read())[0] == len(header) - 8
        with urlopen(f"{address}/api/models/mock/model", timeout=5) as answer:
            assert json.load(answer)["safetensors"]["parameters"] == {"BF16": 6}


def test_shards_hold_at_most_their_limit() -> None:
    specs = [TensorSpec(str(number), "U8", (4,)) for number in range(5)]
    assert [len(shard) for shard in into_shards(specs, limit_bytes=8)] == [2, 2, 1]
