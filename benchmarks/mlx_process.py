"""mlx-lm as a library, in a process of its own: a question per line in, its answers in a line out.

One request goes through ``generate_step``, several through ``BatchGenerator``, as its command line
and its ``batch_generate`` do. Nothing of k2 is imported.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def _alone(model: Any, prompt: list[int], max_tokens: int) -> tuple[list[int], list[float]]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    tokens, times = [], []
    started = time.perf_counter()
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
        tokens.append(int(token))
        times.append(time.perf_counter() - started)
    return tokens, times


def _together(
    model: Any, prompts: list[list[int]], max_tokens: int
) -> list[tuple[list[int], list[float]]]:
    from mlx_lm.generate import BatchGenerator

    started = time.perf_counter()
    generator = BatchGenerator(model)
    ids = generator.insert(prompts, [max_tokens] * len(prompts))
    answers: dict[int, tuple[list[int], list[float]]] = {uid: ([], []) for uid in ids}
    while any(len(tokens) < max_tokens for tokens, _ in answers.values()):
        for response in generator.next_generated():
            tokens, times = answers[response.uid]
            tokens.append(int(response.token))
            times.append(time.perf_counter() - started)
    generator.close()
    return [answers[uid] for uid in ids]


def main() -> None:
    """Load the model named on the command line; answer until standard input ends."""
    from pathlib import Path

    from mlx_lm.utils import load_model

    # Its own output must not get between the answers.
    answers_to, sys.stdout = sys.stdout, sys.stderr
    model, _ = load_model(Path(sys.argv[1]))
    for line in sys.stdin:
        question = json.loads(line)
        prompts, max_tokens = question["prompts"], question["max_tokens"]
        if len(prompts) == 1:
            answers = [_alone(model, prompts[0], max_tokens)]
        else:
            answers = _together(model, prompts, max_tokens)
        answers_to.write(json.dumps(answers) + "\n")
        answers_to.flush()


if __name__ == "__main__":
    main()
