"""The processes of a transfer on the nodes, with lines of JSON in both directions."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any, Literal

import msgspec

from k2cli.agent.weights.json_lines import decode_line, write_all
from k2cli.agent.weights.messages import (
    MAX_LINE_BYTES,
    Alive,
    Failed,
    ReceiverEvent,
    SenderEvent,
)
from k2cli.errors import ClusterError
from k2cli.nodes.node import Node, python_environment
from k2cli.nodes.ssh_connection import SSH_FAILED, connection_to
from k2cli.nodes.ssh_errors import ssh_error

_END_SECONDS = 5.0
_ERROR_BYTES = 4000
# AES in hardware is several times faster than ssh's default; older servers choose another one.
_FAST_CIPHER = ["-o", "Ciphers=^aes128-gcm@openssh.com"]
Module = Literal["receive", "send"]


class NodeProcess:
    """A receiver or sender on a node. Its events go to a queue, as pairs with this process.

    Args:
        node: the machine.
        module: the process to start.
        events: the queue.
        data: a descriptor that the process writes its data to, instead of events; those then come
            by its standard error.

    Raises:
        ClusterError: if it cannot be started.
    """

    def __init__(
        self,
        node: Node,
        module: Module,
        events: queue.Queue[tuple[NodeProcess, Any]],
        data: int | None = None,
    ) -> None:
        self.node = node
        self._kind = ReceiverEvent if module == "receive" else SenderEvent
        self._events = events
        self._ended = False
        self._input_lock = threading.Lock()
        self._input_lent = False
        # Held here too, so that another process can be given the same input.
        read_end, self.input = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                _command(node, module),
                stdin=read_end,
                stdout=subprocess.PIPE if data is None else data,
                stderr=self._errors if data is None else subprocess.PIPE,
                env=python_environment() if node.is_local else None,
                cwd="/",
                # Ctrl-C must reach k2 alone, which ends this process.
                start_new_session=True,
            )
        except OSError as error:
            os.close(self.input)
            self._errors.close()
            raise ClusterError(f"{module} cannot be started for {node.name}: {error}") from error
        finally:
            os.close(read_end)
        output = self._process.stdout if data is None else self._process.stderr
        assert output is not None
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def send(self, order: Any) -> None:
        """Write an order; if the process has ended, its last event tells why."""
        with self._input_lock, contextlib.suppress(OSError):
            if not self._ended:  # another file may have its descriptor by now
                write_all(self.input, msgspec.json.encode(order) + b"\n")

    def lend_input(self, order: Any) -> int:
        """Write an order, after which another process writes the input; return a descriptor.

        Raises:
            ClusterError: if the process was ended.
        """
        with self._input_lock:
            if self._ended:
                raise ClusterError(f"the transfer to node {self.node.name} was ended")
            self._input_lent = True
            with contextlib.suppress(OSError):
                write_all(self.input, msgspec.json.encode(order) + b"\n")
            return os.dup(self.input)

    def take_input_back(self) -> None:
        """Write the input here again."""
        with self._input_lock:
            self._input_lent = False

    def say_alive(self) -> None:
        """Tell the process that the launcher is there, unless another process does."""
        with self._input_lock, contextlib.suppress(OSError):
            if not self._input_lent and not self._ended:
                write_all(self.input, msgspec.json.encode(Alive()) + b"\n")

    def _read(self, output: IO[bytes]) -> None:
        """Put events into the queue, and at the end ``Failed`` if there was no last one."""
        spoke, text = False, b""
        with output:
            while line := output.readline(MAX_LINE_BYTES):
                try:
                    event = decode_line(line, self._kind)
                except msgspec.MsgspecError:
                    # A start-up file or ssh itself says something.
                    text = (text + line)[-_ERROR_BYTES:]
                    continue
                spoke = True
                self._events.put((self, event))
        self._events.put((self, self._end_event(spoke, text)))

    def _end_event(self, spoke: bool, text: bytes) -> Failed:
        status = self._process.wait()
        if not self._errors.closed:
            with contextlib.suppress(OSError, ValueError):
                self._errors.seek(0)
                text += self._errors.read()[-_ERROR_BYTES:]
        said = text.decode(errors="replace")
        if status == SSH_FAILED and not self.node.is_local:
            error = ssh_error(self.node.name, said)
            return Failed(error.message, error.hint or "", again=True)
        last = said.strip().splitlines()[-1:] or [f"it ended with status {status}"]
        return Failed(f"node {self.node.name}: {last[0]}", again=spoke)

    def end(self) -> None:
        """End the process, and wait for it."""
        if self._ended:
            return
        with self._input_lock, contextlib.suppress(OSError):
            self._ended = True
            os.close(self.input)
        try:
            self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(_END_SECONDS)
        self._errors.close()


def _command(node: Node, module: Module) -> Sequence[str]:
    arguments = [node.python, "-P", "-m", f"k2cli.agent.weights.{module}"]
    if node.is_local:
        return arguments
    # A start-up file may print something without a line's end, which would spoil the first one.
    remote = ["sh", "-c", 'echo >&2; echo; exec "$@"', "sh", *arguments]
    command = connection_to(node.name).command(remote)
    return [command[0], *_FAST_CIPHER, *command[1:]]
