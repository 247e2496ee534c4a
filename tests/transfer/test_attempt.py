"""Events of a transfer that come in an unusual order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from k2cli.agent.weights.messages import (
    Connected,
    Failed,
    FileReceived,
    Finished,
    Lacks,
    Listening,
    ModelFiles,
    SendFiles,
    Sent,
    Target,
    WeightsFile,
)
from k2cli.errors import ClusterError
from k2cli.nodes.local import LocalNode
from k2cli.transfer import attempt as attempts
from k2cli.transfer import process as processes
from k2cli.transfer.attempt import Attempt
from k2cli.transfer.parts import share_of
from k2cli.transfer.process import NodeProcess
from k2cli.transfer.request import PushRequest

FILE = WeightsFile("model.safetensors", 10)


class _Receiving(LocalNode):
    name = "b"  # type: ignore[misc]
    is_local = False  # type: ignore[misc]


class _Process:
    """A receiver or sender that only takes note of what it is told."""

    made: list[_Process]

    def __init__(self, node: Any, module: str, events: Any, data: int | None = None) -> None:
        self.module = module
        self.orders: list[Any] = []
        self._events = events
        _Process.made.append(self)

    def send(self, order: Any) -> None:
        self.orders.append(order)

    def tell(self, *events: Any) -> None:
        for event in events:
            self._events.put((self, event))

    def lend_input(self, order: Any) -> int:
        self.orders.append(order)
        return os.open(os.devnull, os.O_WRONLY)

    def take_input_back(self) -> None:
        pass

    def say_alive(self) -> None:
        pass

    def end(self) -> None:
        pass


def test_the_end_of_a_sender_that_could_not_connect_is_not_taken_for_that_of_the_next_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its last words come after the sender that replaces it was started."""
    _Process.made = []
    monkeypatch.setattr(attempts, "NodeProcess", _Process)
    monkeypatch.setattr(attempts, "receiving_addresses", lambda *nodes: ("10.0.0.2",))
    found = ModelFiles(str(tmp_path), Target("path", "/models/m"), (FILE,), {}, {})
    request = PushRequest("m", LocalNode(), found, (_Receiving(),))
    attempt = Attempt(request, {"b": share_of(found, None)}, lambda event: None)
    attempt.start([_Receiving()])
    try:
        (receiver,) = _Process.made
        receiver.tell(Lacks("/models/m", {0: (0,)}, 10, 10**12, {}))
        receiver.tell(Listening(1, "10.0.0.2", 1, "f"))
        start = attempt._start

        def started(node: Any, module: Any, data: int | None = None) -> Any:
            process: Any = start(node, module, data)
            if module == "send" and data is None:
                # It says that nothing answers, and then its end is seen.
                process.tell(Failed("nothing answers", again=True), Failed("ended", again=True))
            elif module == "send":
                process.tell(Connected(), Sent(10, 0.0))
                receiver.tell(FileReceived(0), Finished("/models/m", 0.0))
            return process

        monkeypatch.setattr(attempt, "_start", started)
        attempt.run()
    finally:
        attempt.close()
    assert [process.module for process in _Process.made] == ["receive", "send", "send"]
    assert [len(p.orders) for p in _Process.made[1:]] == [1, 3]
    assert isinstance(_Process.made[2].orders[-1], SendFiles)


def test_nothing_is_written_to_a_descriptor_that_was_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another file may have it by then."""
    import queue

    monkeypatch.setattr(processes, "_command", lambda node, module: ["cat"])
    events: queue.Queue[Any] = queue.Queue()
    process = NodeProcess(LocalNode(), "send", events)
    process.end()
    path = tmp_path / "other"
    other = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        if other != process.input:
            os.dup2(other, process.input)
        process.send(SendFiles(()))
        with pytest.raises(ClusterError):
            process.lend_input(SendFiles(()))
        assert path.read_bytes() == b""
    finally:
        os.close(process.input)
        if other != process.input:
            os.close(other)
