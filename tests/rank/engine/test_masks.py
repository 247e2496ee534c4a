"""The mask process: its masks, its limits, and its end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from k2cli.pauses import Deadline
from k2cli.protocol import Grammar
from k2cli.rank.engine import masks as masks_module
from k2cli.rank.engine.masks import MaskedAnswer, Masks
from lab.toy_k2.vocabulary import VOCABULARY_SIZE, special_id
from tests.support.grammars import LIST, Vocabulary, lark
from tests.support.harness import wait_until
from tests.support.rank_pool import assignments

END = special_id("<|im_end|>")


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def masks(toy_k2: Path, waits: list[float]) -> Iterator[Masks]:
    (assignment,) = assignments(toy_k2, "single", 1, run_id="test-masks")
    made = Masks(assignment, lambda: waits.append(time.monotonic()))
    made.rows = VOCABULARY_SIZE
    yield made
    made.end()


def _process(masks: Masks) -> psutil.Process:
    assert masks._process is not None
    return psutil.Process(masks._process.pid)


def _ready(masks: Masks, grammar: Grammar | None = None) -> MaskedAnswer:
    answer = masks.open(grammar or lark(LIST), [END])
    while answer.pending:
        masks.wait_for_news(0.1)
        masks.poll()
    assert answer.problem is None
    return answer


def test_the_process_gives_the_masks_of_llguidance(masks: Masks, toy_k2: Path) -> None:
    vocabulary = Vocabulary(toy_k2, VOCABULARY_SIZE, END)
    assert masks._process is None  # started by the first grammar alone
    grammars = [lark(LIST), lark('start: /[a-z ]+/ "."')]
    texts = ['["abc",1,"xyz"]', "what is the capital ."]
    tokens = [vocabulary.encode(text) for text in texts]
    answers = [_ready(masks, grammar) for grammar in grammars]
    direct = [vocabulary.matcher(grammar) for grammar in grammars]
    for step in range(max(map(len, tokens))):
        for answer, matcher, wanted in zip(answers, direct, tokens, strict=True):
            if step < len(wanted):
                assert answer.mask == matcher.compute_bitmask()
                matcher.consume_token(wanted[step])
                masks.take(answer, wanted[step])
                assert answer.pending
        masks.wait(answers)
    assert all(answer.complete for answer in answers)


def test_what_one_grammar_says_is_no_concern_of_others(masks: Masks) -> None:
    good = _ready(masks)
    made = lark("start: ( nope")
    bad = masks.open(made, [END])
    masks.wait([bad])
    assert bad.problem is not None
    assert bad.problem.kind == "invalid"
    assert "nope" in bad.problem.text
    masks.take(good, ord("["))
    masks.wait([good])
    assert good.mask is not None
    masks.take(good, ord("x"))
    masks.wait([good])
    assert good.problem is not None


def test_the_process_is_spawned_without_a_fork_and_inherits_its_streams_alone(
    masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork would copy the tables of a model's memory, and take its locks along."""
    spawned: list[str] = []
    spawn = os.posix_spawn

    def spawn_and_note(path: str, *arguments: Any, **options: Any) -> int:
        spawned.append(path)
        return spawn(path, *arguments, **options)

    monkeypatch.setattr(os, "posix_spawn", spawn_and_note)
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    _ready(masks)
    os.close(writing)
    assert os.read(reading, 1) == b""  # no process holds the other end
    os.close(reading)
    assert spawned == [sys.executable]
    arguments = _process(masks).cmdline()
    assert arguments[arguments.index("--k2-run") + 1] == "test-masks"


def test_a_killed_process_fails_its_answers_and_the_next_starts_it_anew(masks: Masks) -> None:
    answer, waiting = _ready(masks), masks.open(lark('start: "other"'), [END])
    _process(masks).kill()
    masks.take(answer, ord("["))
    masks.wait([answer, waiting])
    for failed in (answer, waiting):
        assert failed.problem is not None
        assert failed.problem.kind == "internal"
        assert "was ended by signal 9" in failed.problem.text
        masks.close(failed)
    assert _ready(masks).mask is not None
    # Also if nobody has noticed its end.
    _process(masks).kill()
    assert masks._socket is not None
    assert select.select([masks._socket], [], [], 10)[0]  # its threads may end after it
    assert _ready(masks).mask is not None


def test_a_process_that_does_not_answer_is_ended_and_nobody_waits_longer(
    masks: Masks, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = _ready(masks)
    process = _process(masks)
    process.suspend()
    # From here on: a process that is only slow, beside other work, must not be taken for this one.
    monkeypatch.setattr(masks_module, "ANSWER_SECONDS", 0.6)
    waits.clear()
    masks.take(answer, ord("["))
    masks.wait([answer])
    assert answer.problem is not None
    assert "took longer than 1 s for a token" in answer.problem.text
    assert len(waits) >= 2  # the progress page is advanced meanwhile
    assert not process.is_running()
    # A grammar that takes too long is noticed by ``poll``, without waiting.
    monkeypatch.undo()
    other = _ready(masks)
    _process(masks).suspend()
    masks._open_limit = Deadline(0.6)
    late = masks.open(lark('start: "late"'), [END])
    while late.pending:
        masks.poll()
        time.sleep(0.02)
    assert late.problem is not None
    assert "for a grammar" in late.problem.text
    assert other.problem is not None


def test_a_process_that_reads_nothing_blocks_nobody(masks: Masks) -> None:
    _ready(masks)
    process = _process(masks)
    process.suspend()
    long = "".join(f'"{"letters" * 140}{number}" | ' for number in range(900))
    answers = [masks.open(lark(f'start: {long} "{n}"'), [END]) for n in range(8)]
    assert len(masks._outgoing) < 5 * 2**20  # the others wait in their requests
    masks.close(answers[-1])
    masks.close(answers[0])
    process.resume()
    masks.wait(answers[1:-1])
    # A grammar of this size exceeds its limits, or not; it is answered.
    assert all(not answer.pending for answer in answers[1:-1])
    assert _ready(masks).mask is not None


_RANK = """
import sys
from pathlib import Path
from k2cli.rank.engine.masks import Masks
from tests.support.grammars import LIST, lark
from tests.support.rank_pool import assignments
(assignment,) = assignments(Path(sys.argv[1]), "single", 1)
masks = Masks(assignment, lambda: None)
masks.rows = 1024
answer = masks.open(lark(LIST), [])
masks.wait([answer])
print(masks._process.pid, flush=True)
sys.stdin.read()
"""


def test_the_process_ends_with_its_rank(toy_k2: Path) -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", _RANK, str(toy_k2)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert rank.stdout is not None
    process = psutil.Process(int(rank.stdout.readline()))
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    wait_until(lambda: not process.is_running(), 5, "the end of the mask process")
    rank.stdout.close()
    assert rank.stdin is not None
    rank.stdin.close()
