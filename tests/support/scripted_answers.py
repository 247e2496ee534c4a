"""Answers of a scripted rank, chosen by the conversation that the prompt holds.

The environment variable ``SCRIPT_ANSWERS`` names a JSON file with a list of rules. The first rule
whose ``contains`` are all in the text of the prompt gives the answer. An answer is text in the
model's own format, special tokens included; it becomes tokens with the model's own tokenizer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import Finished, Generate, PromptProgress, RequestFailed, Tokens

ANSWERS_VARIABLE = "SCRIPT_ANSWERS"


@dataclass(frozen=True, slots=True)
class Rule:
    """One answer of a script.

    Attributes:
        answer: the text that the model writes.
        contains: texts that a prompt must hold for this rule.
        pause_seconds: time between two tokens.
    """

    answer: str
    contains: tuple[str, ...] = ()
    pause_seconds: float = 0.0


def save_rules(path: Path, rules: Sequence[Rule]) -> None:
    """Write the file that ``ANSWERS_VARIABLE`` names."""
    path.write_text(json.dumps([asdict(rule) for rule in rules]))


class ScriptedAnswers:
    """Answers requests as a model would that wrote what the rules say."""

    def __init__(self, model: Path, rules: Sequence[Rule]) -> None:
        self._tokenizer = Tokenizer.load(model)
        self._rules = rules
        self._prompts: list[list[int]] = []

    def answer(
        self, request: Generate, send: Callable[[Any], None], cancelled: Callable[[str], bool]
    ) -> None:
        """Send the answer of a request, token by token."""
        prompt = self._tokenizer.decode(request.prompt, skip_special_tokens=False)
        rule = next((r for r in self._rules if all(part in prompt for part in r.contains)), None)
        if rule is None:
            send(RequestFailed(request.request_id, "the script has no rule for this prompt"))
            return
        cached = self._cached_tokens(request.prompt)
        send(PromptProgress(request.request_id, len(request.prompt), len(request.prompt), cached))
        whole = self._tokenizer.encode(rule.answer)
        tokens = whole[: request.max_tokens]
        reason: Any = "stop" if tokens == whole else "length"
        count = 0
        for token in tokens:
            if cancelled(request.request_id):
                reason = "cancelled"
                break
            send(Tokens(request.request_id, [token]))
            count += 1
            time.sleep(rule.pause_seconds)
        self._prompts.append([*request.prompt, *tokens[:count]])
        total = len(request.prompt)
        send(Finished(request.request_id, reason, total, count, cached, 0.0, 0.1, 0.1))

    def _cached_tokens(self, prompt: list[int]) -> int:
        """Return the length of the longest beginning that an earlier request had."""
        longest = 0
        for earlier in self._prompts:
            same = 0
            for mine, theirs in zip(prompt[:-1], earlier, strict=False):
                if mine != theirs:
                    break
                same += 1
            longest = max(longest, same)
        return longest


def answers_of_environment(model_path: str) -> ScriptedAnswers:
    """Return the script that the environment names."""
    name = os.environ[ANSWERS_VARIABLE]
    rules = [
        Rule(rule["answer"], tuple(rule["contains"]), rule["pause_seconds"])
        for rule in json.loads(Path(name).read_text())
    ]
    return ScriptedAnswers(Path(model_path), rules)
