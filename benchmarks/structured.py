"""The cost of grammars: answers that obey a JSON schema against the same without one.

``python -m benchmarks.structured`` measures and writes docs/measurements/structured-output.md. The
model is the large toy of these benchmarks with as many tokens as Kimi K2 has (163,840).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checkpoints import LARGE_TOY
from benchmarks.comparison import say
from benchmarks.report import environment
from benchmarks.statistics import Summary, order_of_round, ratios, summary
from k2cli.grammars.text import GrammarText
from k2cli.models.text.tiktoken_bpe import RESERVED_SPECIAL_TOKENS
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import Finished, Grammar, Sampling, Tokens
from k2cli.rank.engine.masks import Masks
from lab.toy_k2.checkpoint import build_toy_k2
from lab.toy_k2.vocabulary import ranks_file, special_id
from tests.support.rank_pool import RankPool, assignments, running

VOCABULARY = 163_840
ANSWER_TOKENS = 208
TARGET = 1.10
_PROMPT_TOKENS = 48
_WARM_UP_TOKENS = 16
_PAGE = Path(__file__).resolve().parents[1] / "docs/measurements/structured-output.md"
_FILES = ("tiktoken.model", "tokenizer_config.json")
_PAGE_TEXT = """\
# Speed of structured output

`python -m benchmarks.structured` measures this and writes this page. The model is the large toy of
the benchmarks with a head of {vocabulary} rows, and a vocabulary {words} with as many tokens. An
answer has {tokens} tokens. *Schema*: it obeys a JSON schema, a list of 60 objects; *penalties*: it
has a presence penalty; *neither*: its end tokens are ignored. These take turns in each of {rounds}
rounds. Figures are medians, with the least and the most; ratios are those of each round.

{machine}. {versions}. Load average at the end: {load}{shared}.

## Time per token

The target is {target} times the time of *neither*, or less.

| placement | neither, ms | schema, ms | penalties, ms | schema / neither | penalties / neither |
| --- | ---: | ---: | ---: | ---: | ---: |
{rows}

Processor time of the leader rank per token, all its threads; it depends less on other work of the
machine:

| placement | neither, ms | schema, ms | penalties, ms | schema / neither | penalties / neither |
| --- | ---: | ---: | ---: | ---: | ---: |
{processor_rows}

## Time to the first mask

| request | ms |
| --- | ---: |
| the first of a run: the mask process starts and reads the tokenizer | {cold} |
| with a new grammar | {new} |
| with a grammar that was used before | {known} |

Other requests are answered meanwhile.

## Time of a mask

From sending a token to the mask process to having the next mask, for the {masks} tokens of
four JSON texts of 60 objects: median {median} ms, 90th percentile {many}, 99th {most}, longest
{longest}. Masks are computed while the device computes the token, so this time shows only where it
is longer.
"""


def schema(objects: int) -> dict[str, Any]:
    """A list of exactly so many objects."""
    item = {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": 0, "maximum": 99_999},
            "name": {"type": "string", "minLength": 4, "maxLength": 40},
            "kind": {"enum": ["file", "folder", "link"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": ["id", "name", "kind", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": objects, "maxItems": objects}


def grammar(objects: int = 60) -> Grammar:
    """The grammar of ``schema``; of 60 objects, which take more than ``ANSWER_TOKENS``."""
    made = GrammarText({})
    return Grammar(made.build(made.json(schema(objects))))


def made_ranks(count: int) -> list[bytes]:
    """A vocabulary of bytes and random words, for machines without that of a real model."""
    choose = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = [26 - index for index in range(26)]
    found = dict.fromkeys(bytes([value]) for value in range(256))
    for end in itertools.cycle(("", "", "", ",", '"', '":', "\n", "1", ").")):
        if len(found) >= count:
            return list(found)[:count]
        word = "".join(choose.choices(letters, weights, k=choose.randint(1, 9)))
        word = word.capitalize() if choose.random() < 0.2 else word
        found[f"{choose.choice(('', ' ', ' '))}{word}{end}".encode()] = None
    raise AssertionError


def make_model(folder: Path, tokenizer: Path | None) -> Path:
    """Write the model, unless ``folder`` has it."""
    if (folder / "config.json").is_file():
        return folder
    build_toy_k2(folder, dataclasses.replace(LARGE_TOY, vocabulary=VOCABULARY))
    if tokenizer is not None:
        for name in _FILES:
            shutil.copy(tokenizer / name, folder / name)
        return folder
    ranks = VOCABULARY - RESERVED_SPECIAL_TOKENS
    (folder / "tiktoken.model").write_bytes(
        ranks_file({token: rank for rank, token in enumerate(made_ranks(ranks))})
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    shift = ranks - min(map(int, config["added_tokens_decoder"]))
    named = config["added_tokens_decoder"].items()
    config["added_tokens_decoder"] = {str(int(token) + shift): entry for token, entry in named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True, slots=True)
class Case:
    """A placement, and how many requests are answered at once."""

    title: str
    strategy: str = "single"
    ranks: int = 1
    ahead: bool = True
    requests: int = 1


CASES = [
    Case("one rank, looking ahead"),
    Case("one rank, not looking ahead", ahead=False),
    Case("one rank, 8 requests at once", requests=8),
    Case("two ranks, pipeline", "pipeline", 2),
]
PLAIN, MASKED, PENALIZED = KINDS = ("neither", "schema", "penalties")


@contextmanager
def _ranks(model: Path, folder: Path, case: Case) -> Iterator[RankPool]:
    parts = assignments(
        model,
        case.strategy,
        case.ranks,
        context_length=1024,
        concurrency=case.requests,
        prefill_chunk_tokens=256,
        looks_ahead=case.ahead,
    )
    with running(RankPool(parts, folder)) as pool:
        yield pool


def _prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 100_000), k=_PROMPT_TOKENS)


def seconds_per_token(
    pool: RankPool, kind: str, requests: int, round_number: int, tokens: int
) -> tuple[float, float]:
    """Answer so many requests; return seconds per token, and seconds of the leader's processor.

    The former are from the first tokens to the last, the latter of the whole answers.
    """
    leader = psutil.Process(pool.ranks[0].process.pid)
    before = leader.cpu_times()
    sampling = Sampling(presence_penalty=0.1) if kind == PENALIZED else Sampling()
    names = [
        pool.submit(
            _prompt(100 * round_number + number),
            tokens,
            sampling,
            [VOCABULARY - 254] if kind == MASKED else [],
            use_prefix_cache=False,
            grammar=grammar() if kind == MASKED else None,
        )
        for number in range(requests)
    ]
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    finished: dict[str, Finished] = {}
    while len(finished) < requests:
        message = pool.take()
        if isinstance(message, Tokens):
            now = time.perf_counter()
            first.setdefault(message.request_id, now)
            last[message.request_id] = now
        elif isinstance(message, Finished):
            finished[message.request_id] = message
    for name in names:
        assert finished[name].reason == "length", pool.outcomes[name].error
    after = leader.cpu_times()
    processor = after.user + after.system - before.user - before.system
    return (max(last.values()) - max(first.values())) / (tokens - 1), processor / tokens


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds per token of one case, and seconds of the leader's processor, by kind of request."""

    case: Case
    seconds: dict[str, Summary]
    processor: dict[str, Summary]

    @property
    def cells(self) -> str:
        """The row of time per token."""
        return _cells(self.seconds)

    @property
    def processor_cells(self) -> str:
        """The row of processor time per token."""
        return _cells(self.processor)


def _cells(found: dict[str, Summary]) -> str:
    shares = [
        ratios(found[kind].samples, found[PLAIN].samples, more_is_better=True)
        for kind in (MASKED, PENALIZED)
    ]
    return " | ".join(
        [*(_milliseconds(found[kind]) for kind in KINDS), *(_spread(share) for share in shares)]
    )


def measure(model: Path, folder: Path, case: Case, rounds: int, tokens: int) -> Row:
    """Measure all kinds of requests in turn, in each round."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with _ranks(model, folder, case) as pool:
        for kind in KINDS:
            seconds_per_token(pool, kind, case.requests, 99, _WARM_UP_TOKENS)
        for number in range(rounds):
            for kind in KINDS if order_of_round(number) == (0, 1) else reversed(KINDS):
                found[kind].append(seconds_per_token(pool, kind, case.requests, number, tokens))
            say(
                f"{case.title}: "
                + ", ".join(f"{k} {v[-1][0] * 1e3:.2f} ms" for k, v in found.items())
            )
    return Row(
        case,
        *(
            {kind: summary([pair[part] for pair in found[kind]]) for kind in KINDS}
            for part in (0, 1)
        ),
    )


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds until a request with a grammar may begin.

    ``cold``: the mask process is started. ``new``: it runs, but has not seen the grammar.
    ``known``: it has.
    """

    cold: Summary
    new: Summary
    known: Summary


def measure_waits(model: Path, folder: Path, rounds: int) -> Waits:
    """Measure the time in the queue, with a process of its own in each round."""
    found: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        with _ranks(model, folder, CASES[0]) as pool:
            for kind, objects in enumerate((60, 61, 61)):
                name = pool.submit(
                    _prompt(kind), 2, None, [special_id("[EOS]")], grammar=grammar(objects)
                )
                finished = pool.outcome(name).finished
                assert finished is not None
                found[kind].append(finished.queue_seconds)
    return Waits(*map(summary, found))


def sample(objects: int, seed: int) -> str:
    """A JSON text that obeys the schema."""
    choose = random.Random(seed)
    words = ["report", "holiday", "Ünsal", "draft 3", "图表", "invoice-2026", "cat", "a_b"]
    items = [
        {
            "id": choose.randrange(100_000),
            "name": " ".join(choose.choices(words, k=3)),
            "kind": choose.choice(["file", "folder", "link"]),
            "tags": [choose.choice(words)[:12] for _ in range(choose.randint(0, 3))],
        }
        for _ in range(objects)
    ]
    return json.dumps(items, ensure_ascii=False, indent=choose.choice([None, 2]))


def measure_masks(model: Path) -> list[float]:
    """Return the seconds from each token of JSON texts to the next mask, over the socket."""
    tokenizer = Tokenizer.load(model)
    tokens = [tokenizer.encode(sample(60, seed)) for seed in range(4)]
    (assignment,) = assignments(model, "single", 1)
    masks = Masks(assignment, lambda: None)
    masks.rows = VOCABULARY
    found = []
    try:
        for answer_tokens in tokens:
            answer = masks.open(grammar(), [VOCABULARY - 254])
            while answer.pending:
                masks.wait_for_news(0.1)
                masks.poll()
            for token in answer_tokens:
                started = time.perf_counter()
                masks.take(answer, token)
                masks.wait([answer])
                found.append(time.perf_counter() - started)
            masks.close(answer)
    finally:
        masks.end()
    return sorted(found)


def page(rows: Sequence[Row], waits: Waits, masks: Sequence[float], options: Any) -> str:
    """Return the page of results."""
    machine = environment()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    share = [_percentile(masks, percent) * 1e3 for percent in (50, 90, 99, 100)]
    return _PAGE_TEXT.format(
        vocabulary=f"{VOCABULARY:,}",
        words="of a real model" if options.tokenizer else "of random words",
        tokens=options.tokens,
        rounds=options.rounds,
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        versions=f"Python {machine['python']}, {versions}",
        load=f"{machine['load_average'][0]:.1f}",
        shared=(
            ", so other work used the cores too, and times compare within a round only"
            if machine["load_average"][0] > 1.5 * (machine["cores"] or 1)
            else ""
        ),
        target=f"{TARGET:.2f}",
        rows="\n".join(f"| {row.case.title} | {row.cells} |" for row in rows),
        processor_rows="\n".join(f"| {row.case.title} | {row.processor_cells} |" for row in rows),
        cold=_milliseconds(waits.cold),
        new=_milliseconds(waits.new),
        known=_milliseconds(waits.known),
        masks=f"{len(masks):,}",
        median=f"{share[0]:.2f}",
        many=f"{share[1]:.2f}",
        most=f"{share[2]:.2f}",
        longest=f"{share[3]:.2f}",
    )


def _milliseconds(found: Summary) -> str:
    return f"{found.median * 1e3:.2f} ({found.low * 1e3:.2f} to {found.high * 1e3:.2f})"


def _spread(found: Summary) -> str:
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})"


def _percentile(found: Sequence[float], percent: int) -> float:
    return found[min(len(found) - 1, len(found) * percent // 100)]


def _kept(path: Path | None) -> dict[str, Row]:
    """Return the rows of a file, by the title of their placement."""
    if path is None or not path.exists():
        return {}

    def summaries(found: dict[str, Any]) -> dict[str, Summary]:
        return {kind: summary(entry["samples"]) for kind, entry in found.items()}

    rows = [
        Row(Case(**entry["case"]), summaries(entry["seconds"]), summaries(entry["processor"]))
        for entry in json.loads(path.read_text())
    ]
    return {row.case.title: row for row in rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="benchmarks.structured", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=ANSWER_TOKENS, help="of each answer")
    parser.add_argument("--tokenizer", type=Path, help="folder with K2's tokenizer files")
    parser.add_argument("--models", type=Path, help="folder that keeps the model")
    parser.add_argument("--page", type=Path, default=_PAGE)
    parser.add_argument("--only", default="", help="letters of the placements to measure")
    parser.add_argument("--rows", type=Path, help="a file that keeps the rows of earlier runs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="k2-bench-") as temporary:
        folder = Path(temporary)
        os.environ["K2_STATE_DIR"] = str(folder / "state")
        model = make_model((options.models or folder) / "structured-toy", options.tokenizer)
        cases = [case for case in CASES if options.only in case.title]
        rows = _kept(options.rows)
        for case in cases:
            rows[case.title] = measure(model, folder, case, options.rounds, options.tokens)
            if options.rows:
                options.rows.write_text(
                    json.dumps([dataclasses.asdict(row) for row in rows.values()])
                )
        waits = measure_waits(model, folder, options.rounds)
        found = [rows[case.title] for case in CASES if case.title in rows]
        options.page.write_text(page(found, waits, measure_masks(model), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
