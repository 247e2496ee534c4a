"""Invariants of the runtime that no other test shows; docs/design/invariants.md has all ten."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import msgspec
import psutil
import pytest
from mlx.utils import tree_flatten

from k2cli.errors import ClusterError
from k2cli.models.checkpoint import read_checkpoint
from k2cli.planning.memory.decode import decode_activation
from k2cli.planning.memory.ledger import slack_bytes
from k2cli.planning.memory.prefill import activation_shape
from k2cli.protocol import (
    Cancel,
    Decision,
    Finished,
    FollowerMessage,
    Generate,
    Hello,
    RankMessage,
    RequestFailed,
    Sampling,
    Tick,
)
from k2cli.protocol.progress_page import ProgressPage
from k2cli.protocol.wire import Channel, ConnectionLost, authenticate
from k2cli.rank.control import Followers
from k2cli.rank.engine.engine import Engine
from k2cli.rank.executor import Executor
from k2cli.rank.follower import follow
from k2cli.rank.loader import load_part
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.weights_and_cache import kv_cache_bytes
from tests.support.faults import FAULTY_RANKS
from tests.support.harness import supervised
from tests.support.rank_pool import SECRET, RankPool, assignments, running


def _prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(300, 900), k=length)


# --- 1: the leader decides -----------------------------------------------------------------------


def _faulty(**faults: str) -> dict[str, str]:
    paths = [str(FAULTY_RANKS), os.environ["PYTHONPATH"]]
    return {"PYTHONPATH": os.pathsep.join(paths)} | {
        f"FAULTY_RANKS_{name}": value for name, value in faults.items()
    }


class _Unused:
    """An executor that must not be asked for anything but ticks."""

    def carry_out(self, decision: Decision) -> object:
        assert isinstance(decision, Tick)
        from k2cli.rank.executor import StepResult

        return StepResult()


@pytest.mark.parametrize(
    ("tampered", "error", "message"),
    [
        (msgspec.msgpack.encode(Tick(9)), ClusterError, "was told step 9, its next is 8"),
        (msgspec.msgpack.encode({"type": "Decode", "step": 8, "batch": "0", "tokens": []}),
         ConnectionLost, "breaks the protocol"),
        (msgspec.msgpack.encode({"type": "Tick", "step": 8, "and": 1}),
         ConnectionLost, "breaks the protocol"),
        (msgspec.msgpack.encode({"type": "Run", "step": 8}), ConnectionLost, "breaks the protocol"),
        (b"\x80\x04\x95\x0e\x00\x00\x00", ConnectionLost, "breaks the protocol"),
    ],
    ids=["step", "type", "field", "message", "pickle"],
)  # fmt: skip
def test_a_follower_does_nothing_that_is_not_the_leaders_next_decision(
    tampered: bytes, error: type[Exception], message: str
) -> None:
    ours, theirs = socket.socketpair()
    page = ProgressPage.create()
    leader: Channel[FollowerMessage] = Channel(ours, FollowerMessage)
    leader.send(Tick(7))
    ours.sendall(len(tampered).to_bytes(4, "big") + tampered)
    follower: Channel[Decision] = Channel(theirs, Decision)
    with pytest.raises(error, match=message):
        follow(follower, _Unused(), page.advance, 1)  # type: ignore[arg-type]
    leader.close()
    follower.close()
    page.close()


# --- 2: authenticated connections, no secret on a command line ----------------------------------


def test_a_control_connection_is_for_those_who_know_the_secret() -> None:
    """A stranger, one with a wrong secret and one that answers with our own challenge."""
    followers = Followers(lambda rank, cause: None)
    listener = Followers.listen("127.0.0.1")
    address = listener.getsockname()
    accepting = threading.Thread(target=followers.accept, args=(listener, 1, SECRET, 30.0))
    accepting.start()
    with socket.create_connection(address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
    with socket.create_connection(address) as wrong, pytest.raises(ConnectionLost):
        authenticate(wrong, "00" * 32, accepting=False)
    with socket.create_connection(address) as mirror:
        mirror.settimeout(10)
        challenge = mirror.recv(32)
        mirror.sendall(challenge)
        mirror.sendall(mirror.recv(32))
        with contextlib.suppress(ConnectionResetError):
            assert mirror.recv(1) == b""
    assert accepting.is_alive()
    with socket.create_connection(address) as connection:
        authenticate(connection, SECRET, accepting=False)
        Channel[Decision](connection, Decision).send(Hello(1))
        accepting.join(10)
        assert not accepting.is_alive()
        followers.close()
    followers._channels[1].close()


@pytest.mark.ranks
@pytest.mark.parametrize("backend", ["mpi", "ring"])
def test_no_process_shows_the_secret_of_its_run(backend: str) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("reads /proc")
    with supervised(backend) as run:  # type: ignore[arg-type]
        run.wait_ready()
        processes = [psutil.Process(run.supervisor.pid), *run.processes()]
        assert len(processes) >= 5
        for process in processes:
            for name in ("cmdline", "environ"):
                shown = Path(f"/proc/{process.pid}/{name}").read_bytes()
                assert SECRET.encode() not in shown, f"{name} of {process.cmdline()}"
        log = run.record.log_file
        assert not log.exists() or SECRET not in log.read_text()


# --- 3: only token ids travel back --------------------------------------------------------------


def _received_bytes(pid: int) -> int:
    """Bytes that have come over the TCP connections of a process."""
    lines = subprocess.run(
        ["ss", "-tinpH", "state", "established"], capture_output=True, text=True, timeout=30
    ).stdout.splitlines()
    total = 0
    for owner, details in zip(lines[::2], lines[1::2], strict=True):
        if f"pid={pid}," in owner and (found := re.search(r"bytes_received:(\d+)", details)):
            total += int(found[1])
    return total


@pytest.mark.ranks
def test_a_follower_is_sent_token_ids_and_no_hidden_states(toy_k2: Path, tmp_path: Path) -> None:
    if shutil.which("ss") is None:
        pytest.skip("needs ss, of iproute2")
    prompt = _prompt(400, 3)
    width = json.loads((toy_k2 / "config.json").read_text())["hidden_size"]
    with running(RankPool(assignments(toy_k2, "pipeline", 2), tmp_path)) as pool:
        leader, follower = (rank.process.pid for rank in pool.ranks)
        before = _received_bytes(leader), _received_bytes(follower)
        steps = len(pool.generate(prompt, 24, use_prefix_cache=False))
        after = _received_bytes(leader), _received_bytes(follower)
    hidden = (len(prompt) - 1 + steps) * width * 4
    assert hidden <= after[0] - before[0] < 1.1 * hidden + 20_000
    # A decision of up to 200 bytes per step and chunk, and up to 5 bytes per prompt token.
    assert after[1] - before[1] < 200 * (steps + 40) + 5 * len(prompt) < hidden / 2


# --- 4: a stage is never idle while there is work -----------------------------------------------


@pytest.mark.ranks
def test_with_two_requests_both_stages_have_steps_in_flight(toy_k2: Path, tmp_path: Path) -> None:
    """Read the leader's trace: while it works on one batch, the other is with the follower."""
    trace = tmp_path / "trace"
    environment = _faulty(TRACE=str(trace))
    parts = assignments(toy_k2, "pipeline", 2, concurrency=4)
    with running(RankPool(parts, tmp_path, environment=environment)) as pool:
        names = [pool.submit([300 + n, 301], 60, use_prefix_cache=False) for n in range(2)]
        for name in names:
            assert len(pool.outcome(name).tokens) == 60
    steps = [line.split() for line in trace.read_text().splitlines()]
    overlapping = [batch for batch, flying in steps if flying == "0,1"]
    assert len(overlapping) >= 0.9 * len(steps)
    assert {overlapping.count("0"), overlapping.count("1")} <= set(range(50, 61))


# --- 5 and 6: ranks stay in step, or the run ends -----------------------------------------------


@pytest.mark.ranks
def test_a_step_whose_token_nobody_takes_leaves_tensor_ranks_in_step(
    toy_k2: Path, tmp_path: Path
) -> None:
    """A request alone in its batch fails in its sampler: its logits are of no use to anybody."""
    parts = assignments(toy_k2, "tensor", 2)
    with running(RankPool(parts, tmp_path, environment=_faulty())) as pool:
        quiet = pool.generate([301, 302], 16, use_prefix_cache=False)
        broken = pool.submit([310], 16, Sampling(seed=666, temperature=0.5))
        assert "the sampler of this request is broken" in str(pool.outcome(broken).error)
        assert pool.generate([301, 302], 16, use_prefix_cache=False) == quiet


@pytest.mark.ranks
def test_tensor_ranks_whose_sums_are_of_different_steps_end_the_run(
    toy_k2: Path, tmp_path: Path
) -> None:
    """A leader that leaves sums out where it has no use for them: silent, but for this check.

    With steps decided ahead it stalls instead, which is the watchdog's business.
    """
    parts = assignments(toy_k2, "tensor", 2, looks_ahead=False)
    with running(RankPool(parts, tmp_path, environment=_faulty(SUMS="1"))) as pool:
        assert len(pool.generate([301, 302], 40)) == 40
        pool.outcome(pool.submit([310], 16, Sampling(seed=666, temperature=0.5)))
        with pytest.raises(RuntimeError, match="the ranks' sums are out of step"):
            pool.generate([301, 302], 40)


# --- 8: loading proves itself -------------------------------------------------------------------


def test_a_rank_reads_its_own_part_tensor_by_tensor(toy_k2: Path) -> None:
    """Limits of the bytes read: 1.02 times a pipeline part; for tensor, no more than is stored.

    What a tensor rank reads beside its part are gaps of under 32 KiB between its slices, which
    are read through (``tensor_reader``); in the toy nearly all are.
    """
    stored = sum(tensor.nbytes for tensor in read_checkpoint(toy_k2).tensors.values())
    for strategy in ("pipeline", "tensor"):
        for assignment in assignments(toy_k2, strategy, 2, dtype="checkpoint"):
            done = [0]
            group = StandInGroup(assignment.rank, 2)
            part = load_part(assignment, group, lambda now, total, done=done: done.append(now))
            largest = max(tensor.nbytes for tensor in part.held)
            assert max(b - a for a, b in itertools.pairwise(done)) <= largest
            assert len(done) > len(part.held) // 2
            if strategy == "pipeline":
                assert part.bytes_read <= 1.02 * part.weights_bytes
            else:
                assert part.weights_bytes < part.bytes_read <= stored
                assert part.bytes_read - part.bytes_over_read == part.weights_bytes


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("strategy", "name", "value", "message"),
    [
        ("pipeline", "HOLDINGS", "missing", "is held by"),
        ("pipeline", "HOLDINGS", "twice", "model.norm.weight"),
        ("tensor", "SELF_TEST", "1", "self-test failed: rank 1 disagrees with rank 0"),
    ],
    ids=["missing", "twice", "self-test"],
)
def test_a_part_that_is_not_right_is_refused_before_ready(
    strategy: str, name: str, value: str, message: str, toy_k2: Path, tmp_path: Path
) -> None:
    environment = _faulty(**{name: value})
    pool = RankPool(assignments(toy_k2, strategy, 2), tmp_path, environment=environment)
    with pytest.raises(RuntimeError, match=message), running(pool):
        pytest.fail("it became ready")


# --- 9: memory is admitted ----------------------------------------------------------------------

CONTEXT = 512
CONCURRENCY = 4


@pytest.fixture(scope="module")
def idle_engine(toy_k2: Path) -> Iterator[tuple[Engine, list[RankMessage]]]:
    """An engine in this process, with room for four whole contexts."""
    [assignment] = assignments(toy_k2, "single", 1)
    part = load_part(assignment, None, lambda done, total: None)
    told: list[RankMessage] = []
    engine = Engine(
        Executor(part.stage, None),
        Followers(lambda rank, cause: None),
        told.extend,
        size=1,
        context_length=CONTEXT,
        concurrency=CONCURRENCY,
        prefill_chunk_tokens=128,
    )
    yield engine, told
    mx.clear_cache()


def test_what_does_not_fit_waits_or_is_refused_with_the_numbers(
    idle_engine: tuple[Engine, list[RankMessage]],
) -> None:
    engine, told = idle_engine
    for number in range(270):
        engine.accept(Generate(f"q{number}", [300], CONTEXT))
        if number == 0:
            engine.advance()
    refused = [message for message in told if isinstance(message, RequestFailed)]
    assert {message.kind for message in refused} == {"capacity"}
    assert {m.error for m in refused} == {"256 requests are waiting, the queue holds 256"}
    for number in range(270):
        engine.accept(Cancel(f"q{number}"))
    while engine.busy:
        engine.advance()
    finished = [message for message in told if isinstance(message, Finished)]
    assert len(finished) + len(refused) == 270


def test_requests_that_come_and_go_stay_within_the_planned_cache(
    idle_engine: tuple[Engine, list[RankMessage]],
) -> None:
    engine, told = idle_engine
    stage = engine._queue._executor.stage
    weights = sum(value.nbytes for _, value in tree_flatten(stage.model.parameters()))
    planned = kv_cache_bytes(stage, CONTEXT) * CONCURRENCY
    step = decode_activation(
        activation_shape(vars(stage.model.args)),
        device="cpu",
        context_length=CONTEXT,
        concurrency=CONCURRENCY,
        itemsize=4,
    ).peak_bytes
    # The plan's own numbers: cache, allocator's slack, and a step with its masks and logits.
    most = planned + slack_bytes(planned, step) + step
    choose = random.Random(1)
    for number in range(12):
        length = choose.choice([20, CONTEXT // 3, CONTEXT // 2, 3 * CONTEXT // 4])
        engine.accept(Generate(f"m{number}", _prompt(length, number), choose.choice([2, 9, 24])))
    held = []
    while engine.busy:
        engine.advance()
        held.append(mx.get_active_memory() - weights)
    ended = {message.request_id for message in told if isinstance(message, Finished)}
    assert {f"m{number}" for number in range(12)} <= ended
    assert max(held) <= most
    assert max(held) > planned // 2  # the bound was put to a test
