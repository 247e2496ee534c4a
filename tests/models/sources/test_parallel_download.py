"""Transfers of ranges from a faulty server into a folder: what arrives, is sent, and stays."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2cli.errors import K2Error
from k2cli.models.sources.byte_source import ByteSource, FolderSource
from k2cli.models.sources.cache_layout import FolderLayout
from k2cli.models.sources.expected_files import ExpectedFile, verify_file
from k2cli.models.sources.http_source import HttpService, HttpSource
from k2cli.models.sources.journal import Journal, Span, journaled_bytes
from k2cli.models.sources.parallel_download import DownloadProgress, FileFinished, ParallelDownload
from k2cli.models.sources.range_stream import DownloadOptions, RangeStream
from tests.models.mock_hub import COMMIT, MockHub, served_hub

TOKEN = "Bearer hf_secretsecretsecret"
OPTIONS = DownloadOptions(
    streams=4, read_timeout_seconds=0.4, attempts=4, first_backoff_seconds=0.02
)
LARGE, OTHER = "large.safetensors", "other.safetensors"
LARGE_BYTES, OTHER_BYTES = 9_000_001, 1_000_003


@pytest.fixture
def hub() -> Iterator[MockHub]:
    source = random.Random(1)
    files = {LARGE: source.randbytes(LARGE_BYTES), OTHER: source.randbytes(OTHER_BYTES)}
    with served_hub(MockHub({**files, "empty.json": b"", "config.json": b"{}"})) as served:
        yield served


def expected(hub: MockHub) -> list[ExpectedFile]:
    found = []
    for name, data in hub.files.items():
        if name.endswith(".safetensors"):
            found.append(ExpectedFile(name, len(data), sha256=hashlib.sha256(data).hexdigest()))
        else:
            digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            found.append(ExpectedFile(name, len(data), git_sha1=digest))
    return found


def source_of(hub: MockHub, options: DownloadOptions = OPTIONS) -> HttpSource:
    def refusal(response: Any, file: ExpectedFile) -> K2Error:
        return K2Error(f"refused {file.name}: HTTP {response.status_code}")

    service = HttpService(
        "the Hub",
        lambda file: f"{hub.address}/mock/model/resolve/{COMMIT}/{file.name}",
        {"authorization": TOKEN, "user-agent": "test"},
        refusal,
    )
    return HttpSource(service, options.streams, options.read_timeout_seconds)


def transfer(
    files: list[ExpectedFile],
    source: ByteSource,
    folder: Path,
    options: DownloadOptions = OPTIONS,
) -> list[Any]:
    events: list[Any] = []
    places = FolderLayout(folder, COMMIT).places(files, write=True)
    try:
        ParallelDownload([(place, source) for place in places], options, events.append).run()
    finally:
        source.close()
    return events


def partials(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".partial", ".journal") and path.is_file()
    )


RECOVERED = {
    "": 1.0, "redirects": 1.0, "ignores ranges": 2.0, "fails 2 times": 1.0,
    "breaks off 3 times": 1.05, "asks to wait 1 time": 1.0, "sticks 1 time": 1.05,
    "trickles 1 time": 1.05, "damages 1 time": 2.0, "has another etag 2 times": None,
    "lies about its size 2 times": None, "never ends 2 times": None,
}  # fmt: skip
"""Fault -> most bytes sent, as a multiple of the size; None where closing early wastes some."""


@pytest.mark.parametrize(("fault", "most"), RECOVERED.items(), ids=lambda value: str(value))
def test_a_fault_that_passes(hub: MockHub, tmp_path: Path, fault: str, most: float | None) -> None:
    files = expected(hub)
    if fault:
        hub.faults[LARGE] = fault
    events = transfer(files, source_of(hub), tmp_path)
    for file in files:
        assert (tmp_path / file.name).read_bytes() == hub.files[file.name]
    assert partials(tmp_path) == []
    total = sum(file.nbytes for file in files)
    last = [event for event in events if isinstance(event, DownloadProgress)][-1]
    assert (last.done_bytes, last.total_bytes) == (total, total)
    finished = [event.file.name for event in events if isinstance(event, FileFinished)]
    assert sorted(finished) == sorted(hub.files)
    if most is not None:
        assert sum(hub.sent) <= most * LARGE_BYTES + OTHER_BYTES + 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("fails", "HTTP 503, 4 times in a row"),
        ("refuses", "refused large.safetensors: HTTP 403"),
        ("has another etag", "the ETag is that of other content"),
        ("lies about its size", "it says that the file has 9001001 bytes, not 9000001"),
        ("leads nowhere", "to an address that is none"),
        ("damages", "arrived 3 times with another hash"),
    ],
)
def test_a_fault_that_stays(hub: MockHub, tmp_path: Path, fault: str, words: str) -> None:
    hub.faults[LARGE] = fault
    with pytest.raises(K2Error, match=words) as caught:
        transfer(expected(hub), source_of(hub), tmp_path)
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / LARGE).exists()
    # The same call goes on with what it has.
    del hub.faults[LARGE]
    transfer(expected(hub), source_of(hub), tmp_path)
    assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]
    assert (tmp_path / OTHER).read_bytes() == hub.files[OTHER]


def test_a_server_that_names_no_time_is_not_asked_at_once(
    hub: MockHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(RangeStream, "_wait", lambda self, seconds: waits.append(seconds))
    hub.faults[LARGE] = "asks for patience 3 times"
    options = replace(OPTIONS, streams=1, first_backoff_seconds=20.0)
    transfer(expected(hub), source_of(hub), tmp_path, options)
    assert max(waits) > 14.0
    assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]


def test_a_damaged_file_alone_is_fetched_again(hub: MockHub, tmp_path: Path) -> None:
    hub.faults[OTHER] = "damages 1 time"
    transfer(expected(hub), source_of(hub), tmp_path)
    assert (tmp_path / OTHER).read_bytes() == hub.files[OTHER]
    assert LARGE_BYTES + 2 * OTHER_BYTES <= sum(hub.sent) < 1.5 * LARGE_BYTES


def test_credentials_stay_with_their_host(hub: MockHub, tmp_path: Path) -> None:
    with served_hub(MockHub(hub.files)) as store:
        hub.elsewhere = store.address
        hub.faults |= {LARGE: "redirects away", OTHER: "redirects"}
        transfer(expected(hub), source_of(hub), tmp_path)
        assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]
        assert store.requested
        assert store.authorized == []
        assert any(line.endswith(TOKEN) and LARGE in line for line in hub.authorized)
        # What the store answers, and its signed address, are in no message.
        (tmp_path / LARGE).unlink()
        store.faults[LARGE] = "fails"
        with pytest.raises(K2Error) as caught:
            transfer(expected(hub), source_of(hub), tmp_path)
    text = f"{caught.value.message} {caught.value.hint} {caught.value.__cause__}"
    assert "s3cret" not in text
    assert store.address not in text


def test_an_expired_address_of_the_store_is_asked_for_again(hub: MockHub, tmp_path: Path) -> None:
    with served_hub(MockHub(hub.files)) as store:
        hub.elsewhere = store.address
        hub.faults[LARGE] = "redirects away"
        store.faults[LARGE] = "refuses 2 times"
        transfer(expected(hub), source_of(hub), tmp_path)
    assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]


def interrupted(hub: MockHub, folder: Path) -> Path:
    """Transfer the first part of the large file; return its partial file."""
    hub.faults[LARGE] = "breaks off 2 times"
    options = DownloadOptions(streams=1, attempts=1, first_backoff_seconds=0.0)
    source = source_of(hub, options)
    with pytest.raises(K2Error):
        transfer([expected(hub)[0]], source, folder, options)
    hub.faults.clear()
    (partial,) = [path for path in partials(folder) if path.suffix == ".partial"]
    return partial


def test_what_arrived_is_not_sent_again(hub: MockHub, tmp_path: Path) -> None:
    file = expected(hub)[0]
    partial = interrupted(hub, tmp_path)
    there = journaled_bytes(partial.with_suffix(".journal"), file)
    assert 0 < there < LARGE_BYTES
    hub.sent.clear()
    events = transfer([file], source_of(hub), tmp_path)
    assert sum(hub.sent) == LARGE_BYTES - there
    # The rate is that of this run.
    last = [event for event in events if isinstance(event, DownloadProgress)][-1]
    assert last.received_bytes == LARGE_BYTES - there
    assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]


@pytest.mark.parametrize("damage", ["byte", "cut short", "gone", "zeros", "journal"])
def test_a_partial_file_that_a_power_failure_damaged(
    hub: MockHub, tmp_path: Path, damage: str
) -> None:
    file = expected(hub)[0]
    partial = interrupted(hub, tmp_path)
    journal = partial.with_suffix(".journal")
    there = journaled_bytes(journal, file)
    data = bytearray(partial.read_bytes())
    lost = 2**19
    match damage:
        case "byte":
            data[10] ^= 1  # no sample of the journal: found by the hash at the end
            lost = LARGE_BYTES
        case "cut short":
            data = data[: there - lost]
        case "zeros":
            data[:] = bytes(len(data))
            lost = there
        case "gone":
            lost = there
        case "journal":
            with journal.open("r+b") as stream:
                stream.seek(60)
                stream.write(b"\xff" * 3)
    if damage == "gone":
        partial.unlink()
    else:
        partial.write_bytes(data)
    hub.sent.clear()
    transfer([file], source_of(hub), tmp_path)
    assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]
    assert LARGE_BYTES - there < sum(hub.sent) <= LARGE_BYTES - there + lost + 2**18


def test_a_partial_file_of_other_content_is_not_used(hub: MockHub, tmp_path: Path) -> None:
    file = expected(hub)[0]
    partial = interrupted(hub, tmp_path)
    journal = Journal(partial.with_suffix(".journal"), ExpectedFile("x", 5, sha256="0" * 64))
    assert journal.begun
    journal.append(Span(0, 5, 0))
    journal.close()
    transfer([file], source_of(hub), tmp_path)
    assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]


@pytest.mark.parametrize("seed", range(20))
def test_generated_journals(tmp_path: Path, seed: int) -> None:
    """Whatever a journal holds, its spans are inside the file and apart from one another."""
    source, file = random.Random(seed), ExpectedFile("x", 5_000_000, sha256="0" * 64)
    path = tmp_path / "journal"
    journal = Journal(path, file)
    for _ in range(200):
        first = source.randrange(6_000_000)
        journal.append(Span(first, first + source.randrange(2**21), source.randrange(2**32)))
    journal.close()
    content = bytearray(path.read_bytes())
    for _ in range(seed):
        content[source.randrange(45, len(content))] = source.randrange(256)
    path.write_bytes(content[: len(content) - source.randrange(20)])
    again = Journal(path, file)
    again.close()
    end = 0
    for span in again.spans:
        assert end <= span.first < span.past_last <= file.nbytes
        end = span.past_last


def test_a_folder_is_a_source(hub: MockHub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for name, data in hub.files.items():
        (disk / name).write_bytes(data)
    transfer(expected(hub), FolderSource(disk), tmp_path / "here")
    assert (tmp_path / "here" / LARGE).read_bytes() == hub.files[LARGE]
    (disk / OTHER).write_bytes(b"short")
    (tmp_path / "here" / OTHER).unlink()
    with pytest.raises(K2Error, match="has become shorter"):
        transfer(expected(hub), FolderSource(disk), tmp_path / "here")


def test_verify_file_finds_each_damage(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    file = ExpectedFile("data.txt", len(data), sha256=hashlib.sha256(data).hexdigest())
    path = tmp_path / "data.txt"
    assert verify_file(path, file) == "is missing"
    path.write_bytes(data)
    counts: list[int] = []
    assert verify_file(path, file, counts.append) is None
    assert sum(counts) == len(data)
    path.write_bytes(data[:-1])
    assert verify_file(path, file) == "has 2999999 bytes, not 3000000"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "another hash" in (verify_file(path, file) or "")
    weights = ExpectedFile("data.safetensors", len(data), sha256=file.sha256)
    assert "damaged header" in (verify_file(path, weights) or "")
