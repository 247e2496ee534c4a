"""The receiving side against a sender that lies: names, sizes, pieces, strangers and damage."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import struct
import threading
from pathlib import Path

import msgspec
import pytest

from k2cli.agent.weights import messages
from k2cli.agent.weights.certificate import make_client_context
from k2cli.agent.weights.frames import MARK, SegmentReader, SegmentWriter, StreamLost
from k2cli.agent.weights.incoming import IncomingFile, incoming_file, incoming_files
from k2cli.agent.weights.json_lines import Input, Output
from k2cli.agent.weights.listener import Listener
from k2cli.agent.weights.messages import Offer, Segments, SendOrder, Target, WeightsFile
from k2cli.agent.weights.place import (
    Place,
    check_folder,
    check_offer,
    is_known_name,
    place_of,
    record_of,
)
from k2cli.agent.weights.receive import Receiver
from k2cli.agent.weights.send import connect
from k2cli.errors import ClusterError, K2Error, UsageError
from k2cli.models.inventory.find import find_model
from k2cli.models.inventory.verified import note_states, read_states
from k2cli.models.inventory.verify import verify_folder
from k2cli.models.sources.expected_files import ExpectedFile
from k2cli.models.sources.snapshot_record import SnapshotRecord, recorded_snapshot
from tests.support.as_macos import first_accepts

SEGMENT = 1024


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("messages", "incoming", "frames"):
        monkeypatch.setattr(f"k2cli.agent.weights.{module}.SEGMENT_BYTES", SEGMENT)


@pytest.mark.parametrize(
    "name",
    [
        "../config.json", "/etc/passwd", "a/../config.json", "m.safetensors/../../x.safetensors",
        ".ssh/authorized_keys", "sub/model.safetensors", ".hidden.safetensors", "modeling.py",
        "pytorch_model.bin", "", ".safetensors", "model\n.safetensors", "x" * 300 + ".safetensors",
        "additional_chat_templates/../../x.jinja", ".k2-part/../config.json", ".k2-part/files.json",
    ],
)  # fmt: skip
def test_a_name_that_is_no_file_of_a_model_is_refused(name: str) -> None:
    target = Target("path", "/models/x")
    with pytest.raises(UsageError, match="no file of a model"):
        check_offer(Offer(target, (WeightsFile(name, 1),)))
    with pytest.raises(UsageError, match="no file of a model"):
        check_offer(Offer(target, (), {name: 1}))


def test_sizes_counts_and_names_that_clash_are_refused() -> None:
    target = Target("path", "/models/x")
    good = WeightsFile("model.safetensors", 9)
    check_offer(Offer(target, (good, WeightsFile(".k2-part/b.safetensors", 3))))
    for files, reason in (
        ((WeightsFile("model.safetensors", -1),), "cannot have -1 bytes"),
        ((WeightsFile("model.safetensors", 2**60),), "cannot have"),
        ((good, WeightsFile("Model.safetensors", 9)), "differ only in the case"),
        (
            (WeightsFile("\u00e9.safetensors", 9), WeightsFile("e\u0301.safetensors", 9)),
            "the form of accents",
        ),
        ((good, good), "twice"),
        ((WeightsFile("model.safetensors", 9, "../../x"),), "no name of the Hub's cache"),
        ((good,) * 30_000, "k2 takes"),
    ):
        with pytest.raises(UsageError, match=reason):
            check_offer(Offer(target, files))


@pytest.mark.parametrize(
    "target",
    [
        Target("path", "models/x"), Target("path", "/models/../etc"), Target("path", "/"),
        Target("path", "~root/x"), Target("alias", "../x"), Target("alias", "nonsense"),
        Target("hub", "../x", "a" * 40), Target("hub", "a/b", "../../x"), Target("hub", "a/b", ""),
        Target("hub", "a/b", "c", ("../x",)), Target("hub", "a/b", "c", ("/etc/x",)),
        Target("hub", "a/b", "c", ("a//b",)), Target("hub", "a/b/c", "c"),
    ],
)  # fmt: skip
def test_a_place_outside_the_stores_is_refused(target: Target) -> None:
    with pytest.raises(UsageError):
        place_of(target)


def test_a_folder_with_other_weights_or_links_is_refused(tmp_path: Path) -> None:
    place, files = Place(tmp_path), [WeightsFile("model.safetensors", 1)]
    (tmp_path / "model-00001-of-00009.safetensors").touch()
    with pytest.raises(K2Error, match="is not of this model"):
        check_folder(place, files, ())
    (tmp_path / "model-00001-of-00009.safetensors").unlink()
    (tmp_path / "additional_chat_templates").symlink_to("/tmp")
    with pytest.raises(K2Error, match="is a link"):
        check_folder(place, [WeightsFile("additional_chat_templates/a.jinja", 1)], ())


# --- streams ------------------------------------------------------------------------------------


def _frame(index: int, offset: int, data: bytes, digest: bytes | None = None) -> bytes:
    header = struct.pack("<BIQI", 1, index, offset, len(data))
    return header + data + (digest or hashlib.sha256(data).digest())


def _receive(file: IncomingFile, stream: bytes) -> list[int]:
    """Give a stream to a reader; return what it reported as complete."""
    left = memoryview(stream)
    complete: list[int] = []

    def read(buffer: memoryview) -> int:
        nonlocal left
        count = min(len(buffer), len(left), 700)
        buffer[:count] = left[:count]
        left = left[count:]
        return count

    reader = SegmentReader(read, {0: file}, lambda count: None, complete.append)
    reader.skip_greeting()
    reader.receive()
    return complete


def _file(folder: Path, data: bytes) -> IncomingFile:
    file = incoming_file(Place(folder), WeightsFile("model.safetensors", len(data)))
    file.examine(lambda count: None)
    return file


@pytest.mark.usefixtures("small_segments")
def test_what_was_not_asked_for_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    data = os.urandom(3 * SEGMENT + 100)
    first = data[:SEGMENT]
    for stream in (
        _frame(1, 0, first),
        _frame(0, 1, first),
        _frame(0, 0, first[:-1]),
        _frame(0, 4 * SEGMENT, first),
        _frame(0, 2**62, first),
        _frame(0, 0, first) * 2,
        struct.pack("<BIQI", 1, 0, 0, 2**32 - 1),
        struct.pack("<BIQI", 9, 0, 0, 0),
        _frame(0, 0, first, b"\0" * 32),
        _frame(0, 0, first)[:-40],
    ):
        with pytest.raises(StreamLost):
            _receive(_file(tmp_path, data), b"motd" + MARK + stream)
    with pytest.raises(StreamLost, match="something else"):
        _receive(_file(tmp_path, data), b"x" * 100_000)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.usefixtures("small_segments")
def test_confirmed_segments_are_kept_if_they_are_still_whole(tmp_path: Path) -> None:
    data = os.urandom(3 * SEGMENT + 100)
    two = [_frame(0, at, data[at : at + SEGMENT]) for at in (0, 2 * SEGMENT)]
    with pytest.raises(StreamLost, match="was lost"):
        _receive(_file(tmp_path, data), MARK + b"".join(two))
    again = _file(tmp_path, data)
    assert sorted(again.missing) == [1, 3]
    with again.partial.open("r+b") as partial:  # as a broken disk would
        partial.seek(5)
        partial.write(b"!")
    again = _file(tmp_path, data)
    assert sorted(again.missing) == [0, 1, 3]
    rest = [_frame(0, at, data[at : at + SEGMENT]) for at in (0, SEGMENT, 3 * SEGMENT)]
    end = struct.pack("<BIQI", 3, 0, 0, 0)
    assert _receive(again, MARK + b"".join(rest) + end) == [0]
    again.complete()
    assert (tmp_path / "model.safetensors").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.usefixtures("small_segments")
def test_files_of_the_same_content_do_not_empty_each_other(tmp_path: Path) -> None:
    data = os.urandom(SEGMENT + 100)
    blob = hashlib.sha256(data).hexdigest()
    place = Place(tmp_path / "snapshots" / "c", tmp_path / "blobs")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    offers = [WeightsFile(name, len(data), blob) for name in names]
    files = incoming_files(place, offers)
    for file in files:
        file.examine(lambda count: None)
    first, second = files
    stream = MARK + _frame(0, 0, data[:SEGMENT]) + _frame(0, SEGMENT, data[SEGMENT:])
    end = struct.pack("<BIQI", 3, 0, 0, 0)
    assert _receive(first, stream + end) == [0]
    second.open()
    first.complete()
    first.make_link()
    assert (place.folder / names[0]).read_bytes() == data
    assert _receive(second, stream + end) == [0]
    second.complete()
    second.make_link()
    assert (place.folder / names[1]).read_bytes() == data
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [blob]


def test_a_disk_without_links_has_the_file_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    data = b"x" * 100
    place = Place(tmp_path / "snapshots" / "c", tmp_path / "blobs")
    offer = WeightsFile("model.safetensors", 100, hashlib.sha256(data).hexdigest())
    (file,) = incoming_files(place, [offer])
    file.examine(lambda count: None)
    _receive(file, MARK + _frame(0, 0, data) + struct.pack("<BIQI", 3, 0, 0, 0))
    file.complete()
    file.make_link()
    assert file.is_there
    assert (place.folder / "model.safetensors").read_bytes() == data


# --- the port -----------------------------------------------------------------------------------


def test_strangers_are_turned_away_and_the_port_closes(tmp_path: Path) -> None:
    arrived = threading.Event()
    token = "a" * 64
    listener = Listener(["127.0.0.1"], token, 1, lambda stream: (stream.close(), arrived.set()))
    order = SendOrder("", "127.0.0.1", listener.port, listener.fingerprint, token, 1)
    with pytest.raises(ClusterError, match="another program than k2's"):
        connect(messages.SendOrder("", "127.0.0.1", listener.port, "0" * 64, token, 1))
    with pytest.raises((ClusterError, OSError)):
        connect(messages.SendOrder("", "127.0.0.1", listener.port, listener.fingerprint, "b" * 64))
    with socket.create_connection(("127.0.0.1", listener.port)) as plain:
        plain.sendall(token.encode() + b"GET / HTTP/1.0\r\n\r\n")
        plain.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(1) in (b"", b"\x15")  # closed, or an alert of TLS
    with make_client_context().wrap_socket(
        socket.create_connection(("127.0.0.1", listener.port))
    ) as stranger:
        stranger.sendall(b"x" * 64)
        assert stranger.recv(1) == b""
    assert not arrived.is_set()
    connect(order).close()
    assert arrived.wait(10)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.port), 2).close()


def test_a_stranger_that_is_gone_again_does_not_close_the_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first_accepts(monkeypatch, ConnectionAbortedError(), None)
    arrived = threading.Event()
    token = "a" * 64
    listener = Listener(["127.0.0.1"], token, 1, lambda stream: (stream.close(), arrived.set()))
    for _ in range(2):
        socket.create_connection(("127.0.0.1", listener.port)).close()
    order = SendOrder("", "127.0.0.1", listener.port, listener.fingerprint, token, 1)
    connect(order).close()
    assert arrived.wait(10)


def test_a_stranger_that_sends_byte_by_byte_is_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("k2cli.agent.weights.listener._GREETING_SECONDS", 1.0)
    token = "a" * 64
    listener = Listener(["127.0.0.1"], token, 1, lambda stream: stream.close())
    plain = socket.create_connection(("127.0.0.1", listener.port), 10)
    sent = 0
    with make_client_context().wrap_socket(plain) as stranger, contextlib.suppress(OSError):
        stranger.settimeout(0.2)
        while sent < 40:
            stranger.sendall(b"a")
            sent += 1
            with contextlib.suppress(TimeoutError):
                if stranger.recv(1) == b"":
                    break
    listener.close()
    assert sent < 40


def test_a_receiver_that_hears_nothing_ends() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(TimeoutError):
            Receiver(Input(0.2, reading), Output(1)).run()
    finally:
        os.close(reading)
        os.close(writing)


def test_a_second_transfer_to_the_same_folder_waits(tmp_path: Path) -> None:
    offer = Offer(Target("path", str(tmp_path / "m")), (WeightsFile("config.json", 2),))
    first = Receiver(Input(), Output(1))
    first._examine(offer)
    with pytest.raises(StreamLost, match="another transfer"):
        Receiver(Input(), Output(1))._examine(offer)


def test_a_file_of_another_size_is_told_and_stays_until_it_may_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"the user": "wrote this"}')
    offer = Offer(Target("path", str(folder)), (WeightsFile("config.json", 2),))
    receiver = Receiver(Input(), Output(1))
    lacks = receiver._examine(offer)
    assert (lacks.digests, lacks.missing) == ({0: messages.ANOTHER_SIZE}, {})
    for begin in (messages.Begin((), ()), messages.Begin((0,), ())):
        with pytest.raises(UsageError, match=r"config\.json is another file here"):
            receiver._begin(begin)
    # A file that was there, and has vanished since, does not come back as zeros.
    file = incoming_file(Place(folder), WeightsFile("config.json", 2))
    with pytest.raises(OSError, match="vanished"):
        file.complete()
    assert "wrote this" in (folder / "config.json").read_text()


def test_the_sender_sends_no_more_than_the_file_had(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    writer = SegmentWriter(lambda data: None)
    with pytest.raises(K2Error, match="became shorter"):
        writer.send(tmp_path, Segments(0, "model.safetensors", 50, (0,)), 0)


# --- what is there already, and the record ------------------------------------------------------


def _received(place: Place, name: str, data: bytes, blob: str) -> IncomingFile:
    (file,) = incoming_files(place, [WeightsFile(name, len(data), blob, 5_000_000_000)])
    file.examine(lambda count: None)
    frames = [
        _frame(0, at, data[at : at + messages.SEGMENT_BYTES])
        for at in range(0, len(data), messages.SEGMENT_BYTES)
    ]
    _receive(file, MARK + b"".join(frames) + struct.pack("<BIQI", 3, 0, 0, 0))
    file.complete()
    file.make_link()
    return file


def test_a_blob_is_hashed_before_it_counts_as_there(tmp_path: Path) -> None:
    data = os.urandom(5000)
    blob = hashlib.sha256(data).hexdigest()
    place = Place(tmp_path / "snapshots" / "c", tmp_path / "blobs")
    received = _received(place, "model.safetensors", data, blob)
    state = received.state()
    assert state is not None
    assert state.checked == "pieces"

    def read(offered: WeightsFile) -> tuple[int, bool, IncomingFile]:
        """Examine the file again; return the bytes that were read, and whether it is right."""
        counts: list[int] = []
        (file,) = incoming_files(place, [offered])
        file.examine(counts.append)
        return sum(counts), not file.missing, file

    offer = WeightsFile("model.safetensors", len(data), blob, 5_000_000_000)
    assert read(offer)[:2] == (len(data), True)  # nothing was noted
    note_states(place.folder, {"model.safetensors": state})
    assert read(offer)[:2] == (0, True)  # it came from the very file that is offered
    changed = msgspec.structs.replace(offer, modified_ns=6_000_000_000)
    read_bytes, right, file = read(changed)  # the source's file was replaced since
    assert (read_bytes, right) == (len(data), True)
    whole = file.state()
    assert whole is not None
    assert whole.checked == "whole"
    note_states(place.folder, {"model.safetensors": whole})
    assert read(changed)[:2] == (0, True)
    # A blob of the right size with other bytes is not there, and is replaced.
    path = place.folder / "model.safetensors"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    read_bytes, right, file = read(offer)
    assert (read_bytes, right) == (len(data), False)
    assert file.state() is None
    _received(place, "model.safetensors", data, blob)
    assert path.read_bytes() == data


def test_the_receiver_keeps_the_record_of_what_it_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = {"config.json": b"{}", "model.safetensors": b"x" * 300}
    expected = [
        ExpectedFile(name, len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]
    record = SnapshotRecord("hub", "o/n", "main", "c1", (*expected, ExpectedFile("b", 1, "a" * 64)))
    offers = tuple(
        WeightsFile(file.name, file.nbytes, file.blob_name, 5_000_000_000) for file in expected
    )
    target = Target("hub", "o/n", "c1", ("main",))
    offer = Offer(target, offers, {}, record)
    with pytest.raises(UsageError, match="that of 'o/other'"):
        record_of(Offer(target, offers, {}, msgspec.structs.replace(record, repo="o/other")))
    part = record_of(Offer(target, offers, {"b.safetensors": 9}, record))
    assert part is not None
    assert not part.whole

    receiver = Receiver(Input(), Output(os.open(os.devnull, os.O_WRONLY)))
    receiver._examine(offer)
    place = receiver._place
    for file in expected:
        _received(place, file.name, files[file.name], file.blob_name)
    for incoming in receiver._files:
        incoming.missing.clear()
    receiver._finish()
    kept = recorded_snapshot(place.folder)
    assert kept is not None
    assert (kept.repo, kept.commit, kept.whole, kept.files) == ("o/n", "c1", True, tuple(expected))
    assert set(read_states(place.folder, files)) == set(files)
    assert verify_folder(place.folder, kept).damaged == ()
    model = find_model("o/n")
    assert (model.folder, model.record) == (place.folder, kept)


def test_a_name_of_255_bytes_is_received(tmp_path: Path) -> None:
    name, data = f"model-{'x' * 237}.safetensors", os.urandom(3000)
    assert is_known_name(name)
    for place in (Place(tmp_path / "snapshots/c", tmp_path / "blobs"), Place(tmp_path / "own")):
        _received(place, name, data, hashlib.sha256(data).hexdigest())
        assert (place.folder / name).read_bytes() == data
        assert [path.name for path in place.folder.iterdir()] == [name]
