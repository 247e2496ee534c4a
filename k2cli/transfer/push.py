"""Bring a model to nodes: attempts, until all of them have it or it is clear that they cannot.

A connection that breaks costs nothing but time: each attempt asks the receivers what they lack.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from k2cli.agent.weights.messages import ModelFiles
from k2cli.errors import ClusterError, K2Error, UsageError
from k2cli.models.inventory.readers import reading
from k2cli.nodes.node import Node
from k2cli.system.awake import kept_awake
from k2cli.transfer.attempt import Attempt
from k2cli.transfer.copy import copy_to, lacks_k2
from k2cli.transfer.destination import NodeFailed
from k2cli.transfer.feed import Feed, GrowingSource
from k2cli.transfer.parts import Share, lacking, share_of
from k2cli.transfer.request import NodeResult, OnPushEvent, PushRequest, PushStep
from k2cli.units import format_bytes

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 10.0
_FRUITLESS_ATTEMPTS = 6
"""Attempts in a row without a byte, after which a push ends."""


def find_source(reference: str, nodes: Sequence[Node]) -> tuple[Node, ModelFiles]:
    """Find the first of the nodes that has the whole model.

    Raises:
        ClusterError: if none has it.
    """
    problems: list[str] = []
    for node in nodes:
        found: ModelFiles = node.ask(ModelFiles, "weights", reference)
        if not found.problem and not found.absent:
            return node, found
        lacks = format_bytes(sum(found.absent.values()))
        problems.append(f"{node.name}: {found.problem or f'it lacks {lacks}'}")
    raise ClusterError(
        f"no node has the whole of {reference} ({'; '.join(problems)})", f"k2 download {reference}"
    )


def push(request: PushRequest, on_event: OnPushEvent, feed: Feed | None = None) -> list[NodeResult]:
    """Bring a model to nodes, and return what each has received.

    The model is not removed from the sending machine meanwhile, and Macs stay awake.

    Args:
        request: what to send to whom.
        on_event: called with each event.
        feed: makes the files of a source that does not have them yet, in a thread.

    Raises:
        UsageError: if the source lacks files that a node is to have.
        ClusterError: if a node cannot receive the model; the others have it then.
    """
    shares = {}
    for node in request.nodes:
        wanted = request.wanted.get(node.name)
        if left := lacking(request.found, wanted):
            raise UsageError(f"node {request.source.name} itself lacks {left[0]}")
        shares[node.name] = share_of(request.found, wanted)
    work = _Push(request, shares, on_event, feed)
    with ExitStack() as kept:
        if request.source.is_local:
            kept.enter_context(reading(Path(request.found.folder)))
        kept.enter_context(kept_awake())
        kept.callback(work.stop)
        return work.run()


class _Push:
    """The attempts of one push."""

    def __init__(
        self,
        request: PushRequest,
        shares: dict[str, Share],
        on_event: OnPushEvent,
        feed: Feed | None,
    ) -> None:
        self._request = request
        self._shares = shares
        self._say = on_event
        self._results: dict[str, NodeResult] = {}
        self._failed: dict[str, K2Error] = {}
        self._growing = GrowingSource(feed) if feed is not None else None

    def run(self) -> list[NodeResult]:
        self._copy_where_k2_does_not_run()
        fruitless, wait = 0, _FIRST_WAIT_SECONDS
        while nodes := self._left():
            error, received = self._try(nodes)
            if error is None:
                break
            fruitless = 0 if received else fruitless + 1
            wait = _FIRST_WAIT_SECONDS if received else min(wait * 2, _LONGEST_WAIT_SECONDS)
            if not error.again or fruitless >= _FRUITLESS_ATTEMPTS:
                self._failed[error.node] = error
            elif error.node not in self._results:
                self._say(PushStep(f"{error.message}; trying again"))
                time.sleep(wait)
        if self._growing is not None:
            self._growing.wait()
        self._raise_failures()
        return [self._results[node.name] for node in self._request.nodes]

    def stop(self) -> None:
        """End the making of files, if it still runs."""
        if self._growing is not None:
            self._growing.stop()

    def _left(self) -> list[Node]:
        ended = self._results.keys() | self._failed.keys()
        return [node for node in self._request.nodes if node.name not in ended]

    def _try(self, nodes: list[Node]) -> tuple[NodeFailed | None, int]:
        """Make one attempt; return the error that ended it, and the bytes that have arrived."""
        names = ", ".join(node.name for node in nodes)
        self._say(PushStep(f"asking {names} for what is there of {self._request.reference}"))
        attempt = Attempt(self._request, self._shares, self._say)
        failure: NodeFailed | None = None
        try:
            attempt.start(nodes)
            if self._growing is not None:
                attempt.source_grows()
                self._growing.follow(attempt.source_has)
            attempt.run()
        except NodeFailed as error:
            failure = error
        finally:
            attempt.close()
        for result in attempt.results:
            if result.folder:
                self._results[result.node] = result
        if self._growing is not None:
            self._growing.check()
        return failure, attempt.received_bytes

    def _copy_where_k2_does_not_run(self) -> None:
        """Copy to the nodes that have no k2, or to all if the user wants a copy."""
        if self._request.over not in ("auto", "copy") or self._growing is not None:
            return
        for node in self._request.nodes:
            try:
                if self._request.over == "copy" or lacks_k2(node):
                    self._results[node.name] = copy_to(self._request, node, self._say)
            except K2Error as error:
                self._failed[node.name] = error

    def _raise_failures(self) -> None:
        if not self._failed:
            return
        name, error = next(iter(self._failed.items()))
        others = [each for each in self._failed if each != name]
        more = f" (and {', '.join(others)} failed too)" if others else ""
        hint = error.hint or resume_command(self._request)
        raise ClusterError(f"{error.message}{more}", hint)


def resume_command(request: PushRequest) -> str:
    """Return the command that continues a push."""
    names = [node.name for node in request.nodes]
    words = ["k2", "models", "push", request.reference, *names, *request.options]
    return shlex.join([*words, *(["--over", request.over] if request.over != "auto" else [])])
