"""The work that is measured: requests to both programs, and measures of their answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.checkpoints import word_prompt
from benchmarks.client import Ask, Message
from benchmarks.sides import Side
from benchmarks.statistics import (
    Answer,
    decode_rate,
    first_token_seconds,
    prefill_rate,
    whole_rate,
)

SHORT_PROMPT_TOKENS = 16

_ENGLISH = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many "
    "before must through back years where much your way well down should because each just those"
)


@dataclass(frozen=True, slots=True)
class BenchmarkModel:
    """A model under test, as far as the work depends on it. ``prompt`` takes (tokens, seed).

    ``question_tokens`` has the first turn of a chat. ``long_rounds`` is how often at most the long
    prompt counts, where it takes a minute; ``first_tokens`` is how much of it does before.
    """

    title: str
    prompt: Callable[[int, int], str]
    decode_tokens: int
    prefill_tokens: int
    question_tokens: int
    long_rounds: int | None = None
    first_tokens: int | None = None

    @property
    def at_first(self) -> BenchmarkModel:
        """Model of the warm-up round, which does not count."""
        return replace(self, prefill_tokens=self.first_tokens or self.prefill_tokens)

    def rounds_of(self, work: Work, rounds: int) -> int:
        """Return the number of rounds that a piece of work takes part in."""
        return min(rounds, self.long_rounds or rounds) if work.is_long else rounds


def english_prompt(tokens: int, seed: int) -> str:
    """About ``tokens`` tokens of words; each is one token of most vocabularies."""
    return " ".join(random.Random(seed).choices(_ENGLISH.split(), k=tokens))


def toy_prompt(tokens: int, seed: int) -> str:
    """Exactly ``tokens`` tokens of a toy."""
    return word_prompt(tokens, seed)


@dataclass(frozen=True, slots=True)
class Measure:
    """A number computed from answers. ``target`` is the ratio that should be reached."""

    title: str
    unit: str
    more_is_better: bool
    read: Callable[[Sequence[Answer]], float]
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Requests to a side, and measures of the answers; ``is_long``: a long prompt."""

    key: str
    ask: Callable[[Side, BenchmarkModel, int], list[Answer]]
    measures: tuple[Measure, ...]
    is_long: bool = False


def decode(requests: int, target: float) -> Work:
    """Return the work of several short prompts at once, with answers of the same length."""

    def ask(side: Side, model: BenchmarkModel, seed: int) -> list[Answer]:
        prompts = [model.prompt(SHORT_PROMPT_TOKENS, seed * 100 + n) for n in range(requests)]
        return side.ask([Ask(prompt, model.decode_tokens) for prompt in prompts])

    many = f"{requests} requests at once" if requests > 1 else "one request"
    measures = [Measure(f"decode, {many}", "tok/s", True, decode_rate, target)]
    if requests > 1:
        title = f"decode, {many}, from sending to the last token"
        measures.append(Measure(title, "tok/s", True, whole_rate))
    return Work(f"decode-{requests}", ask, tuple(measures))


def prefill(target: float) -> Work:
    """One long prompt and a single token."""

    def ask(side: Side, model: BenchmarkModel, seed: int) -> list[Answer]:
        return side.ask([Ask(model.prompt(model.prefill_tokens, seed * 100 + 50), 1)])

    measure = Measure("prefill", "tok/s", True, prefill_rate, target)
    return Work("prefill", ask, (measure,), is_long=True)


def second_turn(target: float) -> Work:
    """A long question, a short answer, a short question: the wait for the second answer."""

    def ask(side: Side, model: BenchmarkModel, seed: int) -> list[Answer]:
        question = model.prompt(model.question_tokens, seed * 100 + 60)
        turns: list[Message] = [{"role": "user", "content": question}]
        (answer,) = side.ask([Ask(tuple(turns), 16)])
        turns.append({"role": "assistant", "content": answer.content})
        turns.append({"role": "user", "content": model.prompt(8, seed * 100 + 61)})
        return [answer, *side.ask([Ask(tuple(turns), 4)])]

    def read(answers: Sequence[Answer]) -> float:
        return first_token_seconds(answers[1:])

    measure = Measure("second turn of a chat: time to first token", "s", False, read, target)
    return Work("second-turn", ask, (measure,))
