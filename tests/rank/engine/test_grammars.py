"""Answers that obey grammars, on every placement and beside other requests."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from k2cli.protocol import Grammar, Sampling
from lab.toy_k2.vocabulary import VOCABULARY_SIZE, special_id
from tests.support.grammars import (
    LIST,
    SCHEMA,
    Vocabulary,
    is_weather,
    json_schema,
    lark,
    tokens_of,
)
from tests.support.rank_pool import Outcome, RankPool, assignments, running

pytestmark = pytest.mark.ranks

# Strategy, ranks, and whether steps are built ahead. Choices are made on the leader, so steps that
# are not built ahead are tried on one rank: two in tensor parallelism take three times as long.
PLACEMENTS = [
    ("single", 1, True),
    ("single", 1, False),
    ("pipeline", 2, True),
    ("tensor", 2, True),
]
END = special_id("<|im_end|>")
ANSWER_TOKENS = 120
SEEDED = Sampling(temperature=1.0, top_p=0.95, top_k=50, seed=11)
PENALTIES = Sampling(presence_penalty=1.5, frequency_penalty=0.7)
PENALTY_TOKENS = 12


def _prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(300, 900), k=length)


PROMPTS = [_prompt(length, index) for index, length in enumerate([5, 40, 17, 90])]


def _assignments(folder: Path, strategy: str, size: int, *, ahead: bool) -> RankPool:
    parts = assignments(
        folder, strategy, size, concurrency=8, context_length=512, looks_ahead=ahead
    )
    return RankPool(parts, folder.parent)


@pytest.fixture(scope="module", params=PLACEMENTS, ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}")
def pool(request: pytest.FixtureRequest, toy_k2: Path) -> Iterator[RankPool]:
    strategy, size, ahead = request.param
    with running(_assignments(toy_k2, strategy, size, ahead=ahead)) as started:
        yield started


@pytest.fixture(scope="module")
def vocabulary(toy_k2: Path) -> Vocabulary:
    return Vocabulary(toy_k2, VOCABULARY_SIZE, END)


@dataclass(frozen=True)
class Expected:
    """Tokens that one rank chooses, found without masks, deferred choices and other requests."""

    listed: list[list[int]]
    seeded: list[int]
    penalized: list[list[int]]
    plain: list[list[int]]


def _one_by_one(pool: RankPool, prompt: list[int], bias: dict[int, float]) -> int:
    sampling = Sampling(logit_bias=bias)
    return pool.generate(prompt, 1, sampling=sampling, use_prefix_cache=False)[0]


def _listed(pool: RankPool, vocabulary: Vocabulary, prompt: list[int]) -> list[int]:
    """Choose each token in a request of its own, whose bias forbids what llguidance forbids."""
    matcher, tokens = vocabulary.matcher(lark(LIST)), list[int]()
    while not matcher.is_stopped():
        allowed = tokens_of(matcher.compute_bitmask())
        bias = {token: -1000.0 for token in range(VOCABULARY_SIZE) if token not in allowed}
        tokens.append(_one_by_one(pool, [*prompt, *tokens], bias))
        assert matcher.consume_token(tokens[-1])
    return tokens


def _penalized(pool: RankPool, prompt: list[int]) -> list[int]:
    """Choose each token in a request of its own, with the penalties as a bias."""
    tokens: list[int] = []
    for _ in range(PENALTY_TOKENS):
        bias = {
            token: -PENALTIES.presence_penalty - PENALTIES.frequency_penalty * tokens.count(token)
            for token in tokens
        }
        tokens.append(_one_by_one(pool, [*prompt, *tokens], bias))
    return tokens


@pytest.fixture(scope="module")
def expected(toy_k2: Path, vocabulary: Vocabulary) -> Expected:
    with running(_assignments(toy_k2, "single", 1, ahead=False)) as alone:
        return Expected(
            [_listed(alone, vocabulary, prompt) for prompt in PROMPTS[:2]],
            alone.generate(
                PROMPTS[2], ANSWER_TOKENS, sampling=SEEDED, grammar=lark(LIST), stop_tokens=[END]
            ),
            [_penalized(alone, prompt) for prompt in PROMPTS[:1]],
            [alone.generate(prompt, 30, use_prefix_cache=False) for prompt in PROMPTS],
        )


def _submit(
    pool: RankPool,
    prompt: list[int],
    grammar: Grammar | None,
    sampling: Sampling | None = None,
    tokens: int = ANSWER_TOKENS,
) -> str:
    return pool.submit(
        prompt, tokens, sampling, [END] if grammar else [], use_prefix_cache=False, grammar=grammar
    )


def _complete(outcome: Outcome) -> list[int]:
    """Return the tokens of an answer that its grammar has ended."""
    assert outcome.error is None
    assert outcome.finished is not None
    assert outcome.finished.reason == "stop"
    assert outcome.finished.completion_tokens == len(outcome.tokens)
    return outcome.tokens


def test_each_token_is_the_best_that_the_grammar_allows(pool: RankPool, expected: Expected) -> None:
    for prompt, tokens in zip(PROMPTS, expected.listed, strict=False):
        assert _complete(pool.outcome(_submit(pool, prompt, lark(LIST)))) == tokens


def test_answers_with_and_without_grammars_are_those_of_each_alone(
    pool: RankPool, vocabulary: Vocabulary, expected: Expected
) -> None:
    plain = [_submit(pool, prompt, None, tokens=30) for prompt in PROMPTS]
    listed = [_submit(pool, prompt, lark(LIST)) for prompt in PROMPTS[:2]]
    seeded = _submit(pool, PROMPTS[2], lark(LIST), SEEDED)
    penalized = [_submit(pool, prompt, None, PENALTIES, PENALTY_TOKENS) for prompt in PROMPTS[:1]]
    assert [pool.outcome(name).tokens for name in plain] == expected.plain
    assert [_complete(pool.outcome(name)) for name in listed] == expected.listed
    assert _complete(pool.outcome(seeded)) == expected.seeded
    assert vocabulary.completes(lark(LIST), expected.seeded)
    assert [pool.outcome(name).tokens for name in penalized] == expected.penalized


def test_a_grammar_is_obeyed_with_penalties_and_logprobs(
    pool: RankPool, vocabulary: Vocabulary
) -> None:
    grammar = json_schema(SCHEMA)
    blanks = [
        token for token in range(VOCABULARY_SIZE) if not vocabulary.decode([token]).strip(" \n\r\t")
    ]
    sampling = Sampling(
        temperature=0.8,
        seed=3,
        repetition_penalty=1.3,
        presence_penalty=1.0,
        logit_bias=dict.fromkeys(blanks, -50.0),  # which a toy would choose without end
        top_logprobs=20,
    )
    outcome = pool.outcome(_submit(pool, PROMPTS[3], grammar, sampling, tokens=200))
    matcher = vocabulary.matcher(grammar)
    for token, entry in zip(outcome.tokens, outcome.logprobs, strict=True):
        allowed = tokens_of(matcher.compute_bitmask())
        best = dict(entry.top)
        assert token in allowed
        assert set(best) <= allowed
        assert len(best) == min(20, len(allowed))
        assert all(-math.inf < value <= 0 for value in (entry.logprob, *best.values()))
        if len(allowed) <= 20:
            assert math.isclose(sum(map(math.exp, best.values())), 1, abs_tol=1e-4)
        matcher.consume_token(token)
    assert is_weather(vocabulary.decode(_complete(outcome)))


def test_how_an_answer_ends(pool: RankPool, vocabulary: Vocabulary) -> None:
    word = '"abcdef"'
    exact = len(pool.generate(PROMPTS[0], 40, grammar=lark(f"start: {word}"), stop_tokens=[END]))
    for count, reason in ((exact, "stop"), (exact - 1, "length")):
        outcome = pool.outcome(_submit(pool, PROMPTS[0], lark(f"start: {word}"), tokens=count))
        assert outcome.finished is not None
        assert outcome.finished.reason == reason
        assert outcome.finished.completion_tokens == len(outcome.tokens) == count
    # An end token ends it where the grammar allows more; it is not returned.
    outcome = pool.outcome(
        _submit(pool, PROMPTS[0], lark('start: "ab" /[a-z]*/'), Sampling(logit_bias={END: 1000}))
    )
    assert vocabulary.decode(_complete(outcome)) == "ab"
    # Without an end token, the grammar ends it all the same.
    name = pool.submit(PROMPTS[0], 40, grammar=lark('start: "no end"'))
    assert vocabulary.decode(_complete(pool.outcome(name))) == "no end"
    # The beginning that the request gives belongs to the answer, and may be all of it.
    name = _submit(pool, PROMPTS[0], lark('start: "begun and done"', "begun"))
    assert vocabulary.decode(_complete(pool.outcome(name))) == " and done"
    assert _complete(pool.outcome(_submit(pool, PROMPTS[0], lark('start: "all"', "all")))) == []


def test_what_cannot_be_obeyed_is_refused(pool: RankPool, expected: Expected) -> None:
    plain = _submit(pool, PROMPTS[1], None, tokens=30)
    bad = pool.outcome(_submit(pool, PROMPTS[0], lark("start: ( nope")))
    assert bad.error_kind == "invalid"
    assert "nope" in (bad.error or "")
    wrong = pool.outcome(_submit(pool, PROMPTS[0], lark('start: "right"', "wrong")))
    assert wrong.error_kind == "invalid"
    assert "the beginning of the answer" in (wrong.error or "")
    assert pool.outcome(plain).tokens == expected.plain[1]


def _mask_process(pool: RankPool) -> psutil.Process:
    children = psutil.Process(pool.ranks[0].process.pid).children()
    (found,) = [child for child in children if "k2cli.grammars.mask_process" in child.cmdline()]
    return found


def _wait_for_tokens(pool: RankPool, name: str) -> None:
    while not (name in pool.outcomes and len(pool.outcomes[name].tokens) >= 3):
        pool.take()


def test_a_killed_mask_process_ends_answers_with_grammars_alone(
    pool: RankPool, vocabulary: Vocabulary, expected: Expected
) -> None:
    endless = lark("start: /[a-z]/+")
    plain = _submit(pool, PROMPTS[3], None, tokens=30)
    names = [_submit(pool, prompt, endless, tokens=400) for prompt in PROMPTS[:2]]
    _wait_for_tokens(pool, names[0])
    _mask_process(pool).kill()
    for name in names:
        outcome = pool.outcome(name)
        assert outcome.error_kind == "internal"
        assert "signal 9" in (outcome.error or "")
    assert pool.outcome(plain).tokens == expected.plain[3]
    # The process is starting: what is cancelled meanwhile is gone, and others pass.
    cancelled = _submit(pool, PROMPTS[2], endless)
    after = _submit(pool, PROMPTS[0], lark(LIST))
    passing = _submit(pool, PROMPTS[1], None, tokens=30)
    pool.cancel(cancelled)
    outcome = pool.outcome(cancelled)
    assert outcome.finished is not None
    assert outcome.finished.reason == "cancelled"
    assert outcome.tokens == []
    assert pool.outcome(passing).tokens == expected.plain[1]
    assert _complete(pool.outcome(after)) == expected.listed[0]


def test_a_running_answer_with_a_grammar_can_be_cancelled(
    pool: RankPool, expected: Expected
) -> None:
    endless = _submit(pool, PROMPTS[2], lark("start: /[a-z]/+"), tokens=400)
    other = _submit(pool, PROMPTS[1], lark(LIST))
    _wait_for_tokens(pool, endless)
    pool.cancel(endless)
    outcome = pool.outcome(endless)
    assert outcome.finished is not None
    assert outcome.finished.reason == "cancelled"
    assert outcome.finished.completion_tokens == len(outcome.tokens)
    assert _complete(pool.outcome(other)) == expected.listed[1]


def test_many_requests_at_once(pool: RankPool, vocabulary: Vocabulary, expected: Expected) -> None:
    word, number = lark('start: /[a-z]{1,9}/ "." "!"?'), lark("start: /-?[1-9][0-9]{2,5}/")
    # Steps of tensor ranks are slow on few cores.
    count = 16 if pool.assignments[0].strategy == "tensor" else 64
    kinds = [word, number, None, number] * (count // 4)
    names = [
        _submit(pool, PROMPTS[0], grammar, Sampling(temperature=1.0, seed=index), tokens=30)
        if grammar
        else _submit(pool, PROMPTS[0], None, tokens=8)
        for index, grammar in enumerate(kinds)
    ]
    for name, grammar in zip(names, kinds, strict=True):
        outcome = pool.outcome(name, 120)
        if grammar is None:
            assert outcome.tokens == expected.plain[0][:8]
        else:
            assert vocabulary.completes(grammar, _complete(outcome))
