"""Put faults into real ranks, for tests; Python imports this module if it is on the path.

Only ranks are affected. The sampler of requests with seed 666 raises an error. Environment
variables select the other faults:

* ``FAULTY_RANKS_LIE``: rank 1 reports a wrong digest of its tensors while this file exists;
* ``FAULTY_RANKS_HOLDINGS``: rank 1 misses its first tensor (``missing``), or claims one of rank
  0's too (``twice``);
* ``FAULTY_RANKS_SELF_TEST``: rank 1 computes wrong values;
* ``FAULTY_RANKS_SUMS``: rank 0 does not compute the results that it does not need;
* ``FAULTY_RANKS_TRACE``: no fault; rank 0 writes into this file the batch of each decode step that
  it carries out, and the batches whose steps are in flight.
"""

from __future__ import annotations

import os
import sys


def _break_sampler() -> None:
    from k2cli.rank.engine import sampling

    original = sampling.Sampler.pick

    def pick(self, logits):  # type: ignore[no-untyped-def]
        if self.options.seed == 666:
            raise ValueError("the sampler of this request is broken")
        return original(self, logits)

    sampling.Sampler.pick = pick


def _lie_about_state(trigger: str) -> None:
    from k2cli.rank.caches import CacheTable

    original = CacheTable.digest

    def digest(self, step):  # type: ignore[no-untyped-def]
        return "0" * 16 if os.path.exists(trigger) else original(self, step)

    CacheTable.digest = digest


def _lie_about_holdings(how: str) -> None:
    from dataclasses import replace

    from k2cli.protocol import HeldTensor
    from k2cli.rank import loader

    original = loader.load_part

    def load_part(*arguments):  # type: ignore[no-untyped-def]
        part = original(*arguments)
        extra = HeldTensor("model.norm.weight", [64], "float32", 256)
        return replace(part, held=part.held[1:] if how == "missing" else [*part.held, extra])

    loader.load_part = load_part


def _falsify_digests() -> None:
    from k2cli.rank import executor

    executor.array_digest = lambda value: "0" * 16


def _leave_sums_out() -> None:
    from k2cli.rank.executor import StepResult

    StepResult.to_compute = property(lambda self: [] if self.in_step is None else [self.in_step])


def _trace(file: str) -> None:
    from k2cli.protocol import Decode
    from k2cli.rank.engine.steps import StepQueue

    original = StepQueue._carry_out

    def carry_out(self, step, chosen):  # type: ignore[no-untyped-def]
        if isinstance(step.decision, Decode) and step.rows:
            flying = sorted(
                {s.decision.batch for s in self._steps if isinstance(s.decision, Decode)}
            )
            with open(file, "a") as trace:
                trace.write(f"{step.decision.batch} {','.join(map(str, flying))}\n")
        return original(self, step, chosen)

    StepQueue._carry_out = carry_out


if "k2cli.rank.main" in sys.orig_argv:
    _rank = sys.orig_argv[sys.orig_argv.index("--rank") + 1]
    _wanted = {name: os.environ.get(f"FAULTY_RANKS_{name}") for name in
               ("LIE", "HOLDINGS", "SELF_TEST", "SUMS", "TRACE")}  # fmt: skip
    _break_sampler()
    if _rank == "1" and _wanted["LIE"]:
        _lie_about_state(_wanted["LIE"])
    if _rank == "1" and _wanted["HOLDINGS"]:
        _lie_about_holdings(_wanted["HOLDINGS"])
    if _rank == "1" and _wanted["SELF_TEST"]:
        _falsify_digests()
    if _rank == "0" and _wanted["SUMS"]:
        _leave_sums_out()
    if _rank == "0" and _wanted["TRACE"]:
        _trace(_wanted["TRACE"])
