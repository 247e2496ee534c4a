"""The process that receives a model: ``python -m k2cli.agent.weights.receive``.

It is started over SSH and ends with its standard input, so that no port stays open when the
launcher is gone. It tells what is missing, receives that, and puts each complete file in its place.
"""

from __future__ import annotations

import fcntl
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from k2cli.agent.weights.frames import SegmentReader, StreamLost
from k2cli.agent.weights.incoming import IncomingFile, examine_all, incoming_files
from k2cli.agent.weights.json_lines import Input, Output, decode_line
from k2cli.agent.weights.listener import QUIET_SECONDS, Listener
from k2cli.agent.weights.messages import (
    ANOTHER_SIZE,
    CONFIRMED,
    Begin,
    Checked,
    Failed,
    FileReceived,
    Finish,
    Finished,
    Lacks,
    Listen,
    Listening,
    Offer,
    Received,
    ReceiverOrder,
    Stream,
)
from k2cli.agent.weights.place import (
    Place,
    check_folder,
    check_offer,
    place_of,
    record_of,
)
from k2cli.errors import ClusterError, K2Error, UsageError
from k2cli.files import is_same_file, open_regular, unwritable, write_atomically
from k2cli.models.inventory.hub_cache import INCOMING_LOCK
from k2cli.models.inventory.known_folders import Stamp, remember_folder
from k2cli.models.inventory.verified import note_states
from k2cli.models.part import write_part_list
from k2cli.models.sources.snapshot_record import SnapshotRecord, write_record
from k2cli.system.awake import kept_awake
from k2cli.system.disk import disk_use

_SECONDS_BETWEEN_REPORTS = 0.25
_SECONDS_BETWEEN_NOTES = 2.0
_COMPLETING_THREADS = 2


class Receiver:
    """One transfer on the receiving machine."""

    def __init__(self, orders: Input, events: Output) -> None:
        self._orders = orders
        self._events = events
        self._offer: Offer | None = None
        self._place = Place(Path())
        self._record: SnapshotRecord | None = None
        self._noting = threading.Lock()
        self._noted_seconds = 0.0
        self._files: list[IncomingFile] = []
        self._listeners: list[Listener] = []
        self._lock: int | None = None
        self._completing: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(_COMPLETING_THREADS)
        self._received = Count(lambda done: events.send(Received(done)))

    def run(self) -> None:
        """Follow orders until the model is in its place, or nobody gives orders any more.

        Raises:
            K2Error: if the model cannot be received here.
            OSError: if the disk refuses it.
        """
        while (line := self._orders.line()) is not None:
            match decode_line(line, ReceiverOrder):
                case Offer() as offer:
                    self._events.send(self._examine(offer))
                case Begin() as begin:
                    self._begin(begin)
                case Listen() as listen:
                    self._events.send(self._listen(listen))
                case Stream():
                    reader = self._reader(self._orders.read)
                    reader.skip_greeting()
                    reader.receive()
                case Finish():
                    self._finish()
                    return

    def close(self) -> None:
        """Close the ports."""
        for listener in self._listeners:
            listener.close()

    # --- what is missing ------------------------------------------------------------------------

    def _examine(self, offer: Offer) -> Lacks:
        check_offer(offer)
        self._record = record_of(offer)
        self._offer, self._place = offer, place_of(offer.target)
        check_folder(self._place, offer.files, tuple(offer.absent))
        self._take_lock()
        self._files = incoming_files(self._place, offer.files)
        total = sum(file.nbytes for file in offer.files)
        count = Count(lambda done: self._events.send(Checked(done, total)))
        examine_all(self._files, count.add)
        missing = {
            index: tuple(sorted(file.missing))
            for index, file in enumerate(self._files)
            if file.missing
        }
        self._note_states()
        digests = {index: file.digest for index, file in enumerate(self._files) if file.digest}
        lacking = sum(file.missing_bytes for file in self._files)
        return Lacks(str(self._place.folder), missing, lacking, self._free_bytes(), digests)

    def _take_lock(self) -> None:
        """Refuse a second transfer of the same model to this machine."""
        base = self._place.blobs.parent if self._place.blobs else self._place.folder
        base.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(base / INCOMING_LOCK, os.O_WRONLY | os.O_CREAT, mode=0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_same_file(descriptor, base / INCOMING_LOCK):
                raise OSError("its holder has removed it")  # and another may hold the new one
        except OSError:
            # It may be one whose launcher is gone, which ends soon.
            raise StreamLost(f"another transfer to {self._place.folder} is running") from None
        self._lock = descriptor

    def _free_bytes(self) -> int:
        folder = self._place.folder
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        return disk_use(existing).free

    # --- receiving ------------------------------------------------------------------------------

    def _begin(self, begin: Begin) -> None:
        if not all(0 <= i < len(self._files) for i in (*begin.same, *begin.replaced)):
            raise UsageError("the order names a file that was not offered")
        for index, file in enumerate(self._files):
            if file.digest == ANOTHER_SIZE and index not in begin.replaced:
                raise UsageError(f"{file.offer.name} is another file here, and stays")
        for index in begin.same:
            self._files[index].adopt()
            self._files[index].digest = ""
        for index in begin.replaced:
            self._files[index].miss_everything()
        self._remember()
        for index, file in enumerate(self._files):
            if not file.missing:
                # Nothing is sent of an empty file, and of one whose last segment came before.
                self._complete(index, there=file.is_there)

    def _remember(self) -> None:
        """Note the folder, and which files in it k2 writes: the user may have had others there."""
        if self._offer is None or self._offer.target.kind != "path":
            return
        written = [file.offer for file in self._files if file.missing]
        files = {file.name: Stamp(file.nbytes, file.modified_ns) for file in written}
        remember_folder(self._place.folder, "push", files)

    def _listen(self, order: Listen) -> Listening:
        try:
            listener = Listener(order.addresses, order.token, order.streams, self._on_stream)
        except (K2Error, OSError) as error:
            return Listening(order.number, problem=str(error))
        self._listeners.append(listener)
        return Listening(order.number, listener.host, listener.port, listener.fingerprint)

    def _on_stream(self, stream: Any) -> None:
        """Receive one stream of a sender, in the thread of its connection."""
        with stream:
            try:
                reader = self._reader(stream.recv_into)
                reader.skip_greeting()
                reader.receive()
                stream.sendall(CONFIRMED)
            except TimeoutError:
                end_with(self._events, StreamLost("the sender fell silent"))
            except Exception as error:
                if isinstance(error, OSError) and not error.filename:
                    error = StreamLost(f"the connection to the sender was lost: {error}")
                end_with(self._events, error)

    def _reader(self, read: Callable[[memoryview], int]) -> SegmentReader:
        files = dict(enumerate(self._files))
        return SegmentReader(read, files, self._received.add, self._complete)

    def _complete(self, index: int, *, there: bool = False) -> None:
        """Put a complete file in its place, beside the reception of others."""

        def work() -> None:
            try:
                if not there:
                    self._files[index].complete()
                    self._files[index].received = True
                self._files[index].make_link()
                self._note_states(_SECONDS_BETWEEN_NOTES)
            except Exception as error:
                end_with(self._events, error)
            self._events.send(FileReceived(index))

        self._completing.append(self._pool.submit(work))

    def _note_states(self, least_seconds: float = 0.0) -> None:
        """Note which files are right, so that the next transfer need not read them again."""
        with self._noting:
            if time.monotonic() - self._noted_seconds < least_seconds:
                return
            states = {file.offer.name: file.state() for file in self._files}
            note_states(self._place.folder, states)
            self._noted_seconds = time.monotonic()

    # --- the end --------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self._offer is None:
            raise UsageError("nothing was offered")
        for future in self._completing:
            future.result()
        left = next((file for file in self._files if file.missing or not file.is_there), None)
        if left is not None:
            raise ClusterError(f"{left.offer.name} is not complete")
        folder = self._place.folder
        self._note_states()
        if self._record is not None:
            write_record(folder, self._record)
        if self._offer.absent:
            write_part_list(folder, self._offer.absent)
        if self._place.references is not None:
            for name in self._offer.target.references:
                path = self._place.references / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, self._offer.target.commit)
        base = self._place.blobs.parent if self._place.blobs else folder
        (base / INCOMING_LOCK).unlink(missing_ok=True)
        self._events.send(Finished(str(folder), cpu_seconds()))


class Count:
    """Counter of bytes for several threads that reports a few times a second."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._done = 0
        self._reported = time.monotonic()

    def add(self, count: int) -> None:
        """Add bytes."""
        with self._lock:
            self._done += count
            now, done = time.monotonic(), self._done
            if now - self._reported < _SECONDS_BETWEEN_REPORTS:
                return
            self._reported = now
        self._report(done)


def cpu_seconds() -> float:
    """Return the processor time of this process, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def failure_of(error: Exception) -> Failed:
    """Return the event that tells an error."""
    if isinstance(error, StreamLost):
        return Failed(error.message, again=True)
    if isinstance(error, TimeoutError | ConnectionError):
        return Failed(f"the connection was lost: {error}", again=True)
    if isinstance(error, OSError) and error.filename:
        error = unwritable(error, Path(os.fsdecode(error.filename)))
    if isinstance(error, K2Error):
        return Failed(error.message, error.hint or "")
    return Failed(f"{type(error).__name__}: {error}")


def end_with(events: Output, error: Exception) -> None:
    """Tell an error and end the process: other threads may wait for data that never come."""
    events.send(failure_of(error))
    os._exit(1)


def main() -> None:
    """Receive a model as standard input says."""
    events = Output(1)
    receiver = Receiver(Input(QUIET_SECONDS), events)
    try:
        with kept_awake():
            receiver.run()
    except (K2Error, OSError, ValueError, msgspec.MsgspecError) as error:
        end_with(events, error)
    receiver.close()
    # A stream may still wait for its sender, which is gone.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
