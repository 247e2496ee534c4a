"""Messages of a transfer of weights: JSON lines between the launcher and one process per machine.

The receiver is told what is offered (``Offer``), says what it lacks (``Lacks``), and then receives
(``Begin``) over TLS from senders that it lets in (``Listen``), or over its standard input
(``Stream``). The sender is told where to send (``SendOrder``), and then which files may be sent
(``SendFiles``).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from k2cli.models.sources.snapshot_record import SnapshotRecord

SEGMENT_BYTES = 32 * 2**20
"""Bytes that are hashed, confirmed and continued as one piece."""

ADMITTED, CONFIRMED = b"\1", b"\2"
"""Bytes of the receiver to a sender over TLS: its token is right; its stream has arrived whole."""

MAX_LINE_BYTES = 64 * 2**20
MAX_FILES = 20_000
MAX_FILE_BYTES = 2**45


class WeightsFile(msgspec.Struct, frozen=True):
    """A file of a model.

    ``name`` is its path in the model's folder. ``blob`` is the name under which the cache of the
    Hub library stores the data, "" elsewhere. ``modified_ns`` is its time of change.
    """

    name: str
    nbytes: int
    blob: str = ""
    modified_ns: int = 0


class Target(msgspec.Struct, frozen=True):
    """The place of a model, which each machine translates to a folder of its own.

    ``kind`` is ``hub`` (``name`` is the repository, ``commit`` and ``references`` its revision),
    ``alias`` (``name`` is that of a folder of k2's own, such as of a model that k2 converts) or
    ``path`` (``name`` is the folder).
    """

    kind: Literal["hub", "alias", "path"]
    name: str
    commit: str = ""
    references: tuple[str, ...] = ()


class ModelFiles(msgspec.Struct, frozen=True):
    """A model on a machine: its folder and files, or why it cannot be sent.

    ``absent`` are the weight files that a part of the model lacks, with their sizes;
    ``header_bytes`` is the length of the header of each weight file. ``record`` is what the machine
    knows about the files of the whole model.
    """

    folder: str = ""
    target: Target | None = None
    files: tuple[WeightsFile, ...] = ()
    absent: dict[str, int] = {}
    header_bytes: dict[str, int] = {}
    problem: str = ""
    record: SnapshotRecord | None = None


# --- to and from the receiver -------------------------------------------------------------------


class Offer(msgspec.Struct, frozen=True, tag=True):
    """Files that a machine is to have. ``absent`` are weight files that it is not to get.

    Their headers are offered as files of the folder ``models.part.FOLDER``. ``record`` is what the
    source knows about the files of the whole model.
    """

    target: Target
    files: tuple[WeightsFile, ...]
    absent: dict[str, int] = {}
    record: SnapshotRecord | None = None


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Order to receive what is missing.

    ``same`` are files whose digest is that of the source; ``replaced`` those that may be replaced.
    """

    same: tuple[int, ...] = ()
    replaced: tuple[int, ...] = ()


class Listen(msgspec.Struct, frozen=True, tag=True):
    """Order to listen for one sender, on the first of the addresses that is this machine's.

    ``number`` names the order in its answer. The port is closed after so many streams.
    """

    number: int
    token: str
    addresses: tuple[str, ...]
    streams: int


class Stream(msgspec.Struct, frozen=True, tag=True):
    """Order to receive one stream on standard input, which begins after this line."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Sign that the launcher is there; a receiver that gets none for some time ends."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Order to complete the model: everything has been sent."""


ReceiverOrder = Offer | Begin | Listen | Stream | Alive | Finish


class Checked(msgspec.Struct, frozen=True, tag=True):
    """Bytes of earlier files and pieces that have been compared so far."""

    done_bytes: int
    total_bytes: int


ANOTHER_SIZE = "another size"


class Lacks(msgspec.Struct, frozen=True, tag=True):
    """Answer to an offer: the numbers of the segments that each file lacks, by its index.

    ``digests`` are the SHA-256 of files that are there with another time of change than the
    source's, and ``ANOTHER_SIZE`` for those of another size. Whether they are the same is for the
    launcher to decide, and whether others are replaced.
    """

    folder: str
    missing: dict[int, tuple[int, ...]]
    missing_bytes: int
    free_bytes: int
    digests: dict[int, str] = {}


class Listening(msgspec.Struct, frozen=True, tag=True):
    """Answer to ``Listen``: the address to connect to, and the fingerprint of the certificate.

    ``problem`` says why it cannot listen.
    """

    number: int
    host: str = ""
    port: int = 0
    fingerprint: str = ""
    problem: str = ""


class Received(msgspec.Struct, frozen=True, tag=True):
    """Bytes that have been received, hashed and written since ``Begin``."""

    done_bytes: int


class FileReceived(msgspec.Struct, frozen=True, tag=True):
    """A file is complete, verified and in its place."""

    index: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The model is in its place."""

    folder: str
    cpu_seconds: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The end of a process. ``again`` is True if another attempt may succeed."""

    message: str
    hint: str = ""
    again: bool = False


ReceiverEvent = Checked | Lacks | Listening | Received | FileReceived | Finished | Failed


# --- to and from a sender -----------------------------------------------------------------------


class Segments(msgspec.Struct, frozen=True):
    """Segments of one file to send. ``source`` is its path in the sender's folder."""

    index: int
    source: str
    nbytes: int
    numbers: tuple[int, ...]


class SendOrder(msgspec.Struct, frozen=True, tag=True):
    """The receiver to send to. Without a host the data go to stdout, in one stream."""

    folder: str
    host: str = ""
    port: int = 0
    fingerprint: str = ""
    token: str = ""
    streams: int = 1


class SendFiles(msgspec.Struct, frozen=True, tag=True):
    """Files that may be sent now; an empty list is the end."""

    files: tuple[Segments, ...]


SenderOrder = SendOrder | SendFiles


class Connected(msgspec.Struct, frozen=True, tag=True):
    """The receiver has let the sender in."""


class Sent(msgspec.Struct, frozen=True, tag=True):
    """Everything was sent, and the receiver has confirmed it."""

    nbytes: int
    cpu_seconds: float = 0.0


SenderEvent = Connected | Sent | Failed


def segment_count(nbytes: int) -> int:
    """Return the number of segments of a file; an empty file has none."""
    return -(-nbytes // SEGMENT_BYTES)


def segment_length(nbytes: int, number: int) -> int:
    """Return the length of a segment of a file, in bytes."""
    return min(SEGMENT_BYTES, nbytes - number * SEGMENT_BYTES)
