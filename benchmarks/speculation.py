"""What speculation brings: answers that copy and answers that do not, with drafts and without.

``python -m benchmarks.speculation MODEL`` measures with the demo model's checkpoint and writes
docs/measurements/speculation.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from benchmarks.comparison import say
from benchmarks.report import environment
from benchmarks.statistics import Summary, order_of_round, ratios, summary
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import Finished, Sampling, Tokens
from tests.support.rank_pool import RankPool, assignments, running

_PAGE = Path(__file__).resolve().parents[1] / "docs/measurements/speculation.md"
_SOURCE = Path(__file__).resolve().parents[1] / "k2cli/rank/engine/prefixes/tree.py"
_PROMPT_TOKENS, _BEGUN_TOKENS = 300, 24
_PAGE_TEXT = """\
# Speed with and without speculation

`python -m benchmarks.speculation MODEL` measures this and writes this page. The model is the demo
model (SmolLM2-135M-Instruct) with bfloat16 weights, on the CPU. mlx-lm cannot cut it into two
slices, so for tensor parallelism it is a Llama of 8 layers with random weights, 27 million, whose
*copy* is one token that repeats: the best case. MLX's CPU multiplies quantized weights and experts
token by token, so that drafts do not pay there, and `auto` leaves them out.
Answers have {tokens} tokens, and each task is answered with speculation and without in turn, in
each of {rounds} rounds ({toy_rounds} with the toy). Figures are tokens per second of decode,
medians with the least and the most; ratios are those of each round.

* *copy*: the prompt is {prompt} tokens of a program and the beginning of the same program again;
  the answer is greedy, and copies.
* *new text*: a few words, answered at temperature 1.5; nothing repeats.
* *copy beside another*: *copy*, while another request is answered at temperature 1.5 in the other
  batch of the pipeline. Where both are rows of one batch, neither has drafts.

The targets for two ranks are 1.5 times the speed for *copy* and 0.97 for *new text*, or more.

{machine}. {versions}. Load average at the end: {load}{shared}.

| placement | task | without | with | with / without | tokens drafted | accepted |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
{rows}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A placement of the demo model, of which mlx-lm makes no two slices, or of a toy."""

    title: str
    strategy: str = "single"
    ranks: int = 1
    toy: bool = False


CASES = [
    Case("two ranks, tensor (toy)", "tensor", 2, toy=True),
    Case("two ranks, pipeline (toy)", "pipeline", 2, toy=True),
    Case("two ranks, pipeline", "pipeline", 2),
    Case("one rank"),
]
TASKS = ("copy", "new text", "copy beside another")
_TOY_ROUNDS = 3
_LOOP_BIAS = {320: 1000.0}


def without_quantization(source: Path, folder: Path) -> Path:
    """Write a checkpoint with bfloat16 weights: MLX's CPU multiplies quantized ones row by row."""
    config = json.loads((source / "config.json").read_text())
    settings = config.pop("quantization")
    stored: dict[str, mx.array] = {}
    for path in source.glob("*.safetensors"):
        stored |= cast(dict[str, mx.array], mx.load(str(path)))
    weights = {}
    for name, value in stored.items():
        module = name.rpartition(".")[0]
        if name.endswith((".scales", ".biases")):
            continue
        if f"{module}.scales" in stored:
            own = settings.get(module, settings)
            value = mx.dequantize(
                value, stored[f"{module}.scales"], stored.get(f"{module}.biases"),
                group_size=own["group_size"], bits=own["bits"],
            )  # fmt: skip
        weights[name] = value.astype(mx.bfloat16)
    folder.mkdir()
    for path in source.glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    return folder


def make_dense_toy(folder: Path) -> Path:
    """Write a Llama of 27 million random weights."""
    hidden, inner, layers, vocabulary = 512, 1536, 8, 1024
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for layer in range(layers):
        own = f"model.layers.{layer}"
        shapes |= {f"{own}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{own}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{own}.mlp.down_proj"] = (hidden, inner)
    mx.random.seed(0)
    weights = {
        f"{name}.weight": (mx.random.normal(shape) * 0.05).astype(mx.bfloat16)
        for name, shape in shapes.items()
    }
    norms = [f"model.layers.{layer}.{at}_layernorm" for layer in range(layers)
             for at in ("input", "post_attention")]  # fmt: skip
    weights |= {
        f"{name}.weight": mx.ones((hidden,), mx.bfloat16) for name in [*norms, "model.norm"]
    }
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens per second of one answer, and its drafts."""

    rate: float
    drafted: int
    accepted: int
    tokens: tuple[int, ...]


@contextmanager
def _ranks(model: Path, folder: Path, case: Case) -> Iterator[RankPool]:
    parts = assignments(
        model, case.strategy, case.ranks, context_length=2048, concurrency=2,
        prefill_chunk_tokens=256, dtype="bfloat16",
    )  # fmt: skip
    with running(RankPool(parts, folder)) as pool:
        yield pool


def prompts(model: Path) -> dict[str, list[int]]:
    """Return the prompt of each task."""
    tokenizer = Tokenizer.load(model)
    program = tokenizer.encode(_SOURCE.read_text(encoding="utf-8"))[:_PROMPT_TOKENS]
    copy = [*program, *tokenizer.encode("\n\n"), *program[:_BEGUN_TOKENS]]
    new = tokenizer.encode("A story of a lighthouse, a violin and the tax office:")
    return {"copy": copy, "new text": new, "copy beside another": copy}


def answer(
    pool: RankPool,
    prompt: list[int],
    task: str,
    tokens: int,
    seed: int,
    *,
    speculates: bool,
    toy: bool = False,
) -> Measured:
    """Answer one request."""
    bias = _LOOP_BIAS if toy and task != "new text" else {}
    sampling = Sampling(temperature=1.5 * (task == "new text"), seed=seed, logit_bias=bias)
    other = None
    if task == "copy beside another":
        hot = Sampling(temperature=1.5, seed=seed)
        other = pool.submit(prompt[:40], 2000, hot, use_prefix_cache=False)
        while not pool.outcomes.get(other) or not pool.outcomes[other].tokens:
            pool.take()
    name = pool.submit(prompt, tokens, sampling, use_speculation=speculates)
    times: list[float] = []
    finished = None
    while finished is None:
        message = pool.take()
        if isinstance(message, Tokens) and message.request_id == name:
            times.append(time.perf_counter())
        if isinstance(message, Finished) and message.request_id == name:
            finished = message
    if other is not None:
        pool.cancel(other)
        pool.outcome(other)
    found = pool.outcomes[name].tokens
    assert len(found) == tokens
    rate = (tokens - 1) / (times[-1] - times[0])
    return Measured(rate, finished.draft_tokens, finished.accepted_tokens, tuple(found))


@dataclass(frozen=True, slots=True)
class Row:
    """Rates of one placement and task, without and with speculation."""

    case: Case
    task: str
    without: Summary
    with_drafts: Summary
    drafted: float
    accepted: float

    @property
    def ratio(self) -> Summary:
        """With speculation relative to without, of each round."""
        return ratios(self.with_drafts.samples, self.without.samples, more_is_better=True)

    @property
    def text(self) -> str:
        """The row of the table."""
        cells = [
            self.case.title, self.task, _rate(self.without), _rate(self.with_drafts),
            f"{self.ratio.median:.2f} ({self.ratio.low:.2f} to {self.ratio.high:.2f})",
            f"{self.drafted:.0f}", f"{self.accepted:.0f}",
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def _rate(found: Summary) -> str:
    return f"{found.median:.1f} ({found.low:.1f} to {found.high:.1f})"


def measure(
    model: Path,
    toy: Path,
    folder: Path,
    case: Case,
    tasks: Sequence[str],
    rounds: int,
    tokens: int,
) -> list[Row]:
    """Measure all tasks on a placement, with and without in turn."""
    asked = prompts(model)
    if case.toy:
        asked = {task: [token % 256 + 300 for token in prompt] for task, prompt in asked.items()}
    found: dict[tuple[str, bool], list[Measured]] = {}
    with _ranks(toy if case.toy else model, folder, case) as pool:
        for speculates in (False, True):
            answer(pool, asked["copy"], "copy", 40, 0, speculates=speculates, toy=case.toy)
        for number in range(rounds):
            for task in tasks:
                turns = (False, True) if order_of_round(number) == (0, 1) else (True, False)
                for speculates in turns:
                    one = answer(
                        pool, asked[task], task, tokens, number, speculates=speculates,
                        toy=case.toy,
                    )  # fmt: skip
                    found.setdefault((task, speculates), []).append(one)
                off, on = found[task, False][-1], found[task, True][-1]
                say(
                    f"{case.title}, {task}: {off.rate:.1f} and {on.rate:.1f} tokens/s, "
                    f"{on.accepted} of {on.drafted}, same text: {off.tokens == on.tokens}"
                )
    return [
        Row(
            case,
            task,
            summary([one.rate for one in found[task, False]]),
            summary([one.rate for one in found[task, True]]),
            summary([one.drafted for one in found[task, True]]).median,
            summary([one.accepted for one in found[task, True]]).median,
        )
        for task in tasks
    ]


def page(rows: Sequence[Row], options: Any) -> str:
    """Return the page of results."""
    machine = environment()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    busy = machine["load_average"][0] > 1.5 * (machine["cores"] or 1)
    return _PAGE_TEXT.format(
        tokens=options.tokens,
        rounds=options.rounds,
        toy_rounds=options.rounds * _TOY_ROUNDS,
        prompt=_PROMPT_TOKENS,
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        versions=f"Python {machine['python']}, {versions}",
        load=f"{machine['load_average'][0]:.1f}",
        shared=(
            ", so other work used the cores too, and speeds compare within a round only"
            if busy
            else ""
        ),
        rows="\n".join(row.text for row in rows),
    )


def main() -> None:
    """Measure, and write the page unless a part is asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.speculation")
    parser.add_argument("model", type=Path, help="checkpoint of the demo model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", help="part of the title of placements; prints, writes nothing")
    parser.add_argument("--task", choices=TASKS, help="only this task; prints, writes nothing")
    options = parser.parse_args()
    cases = [case for case in CASES if (options.only or "") in case.title]
    tasks = [task for task in TASKS if options.task in (None, task)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = without_quantization(options.model, Path(folder) / "demo")
        toy = make_dense_toy(Path(folder) / "toy")
        for case in cases:
            # Beside another, a row of the same batch has no drafts; a pipeline has two batches.
            own = [task for task in tasks if case.strategy == "pipeline" or "beside" not in task]
            rounds = options.rounds * (_TOY_ROUNDS if case.toy else 1)
            rows += measure(model, toy, Path(folder), case, own, rounds, options.tokens)
    text = page(rows, options)
    if options.only or options.task:
        say(text)
    else:
        _PAGE.write_text(text, encoding="utf-8")
    say(json.dumps([row.text for row in rows]))


if __name__ == "__main__":
    main()
