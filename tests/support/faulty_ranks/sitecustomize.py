"""Put faults into real ranks, for tests; Python imports this module if it is on the path.

Only ranks are affected. The sampler of requests with seed 666 raises an error. Environment
variables select the other faults:

* ``FAULTY_RANKS_LIE``: rank 1 reports a wrong digest of its tensors while this file exists;
* ``FAULTY_RANKS_HOLDINGS``: rank 1 misses its first tensor (``missing``), or claims one of rank
  0's too (``twice``);
* ``FAULTY_RANKS_SELF_TEST``: rank 1 computes wrong values;
* ``FAULTY_RANKS_TRANSFER`` is ``RANKS WHAT BYTES CALLS``: on these ranks (``0`` or ``0,1``)
  hidden states of more than BYTES bytes come out wrong of ``all_sum`` or ``recv`` (WHAT), in one
  position, after CALLS of them were right;
* ``FAULTY_RANKS_SUMS``: rank 0 does not compute the results that it does not need;
* ``FAULTY_RANKS_TRACE``: no fault; rank 0 writes into this file the batch of each decode step that
  it carries out, and the batches whose steps are in flight;
* ``FAULTY_RANKS_STEP`` is ``RANK HOW SECONDS``: that rank does something else for a while before it
  computes the first part of a prompt, and once more before the first one while the file
  ``FAULTY_RANKS_STEP_AFTER`` exists. HOW is ``hang``, ``spin`` (processor time alone), ``touch``
  (memory, as a compiler does), ``child`` (a process that computes), ``stuck-child`` (one that does
  nothing) or ``read`` (files);
* ``FAULTY_RANKS_LOADING`` is ``RANK SECONDS``: that rank hangs before it loads its part;
* ``FAULTY_RANKS_DEVICE``: the kind of device for which the warm-up chooses its shapes; with
  ``cuda`` later stages of a pipeline compute each shape with made-up hidden states first.
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
    from k2cli.rank.kv_cache.table import CacheTable

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


def _corrupt_transfers(what: str, least_bytes: int, calls: int) -> None:
    import mlx.core as mx

    original = getattr(mx.distributed, what)
    right = [calls]

    def transfer(*arguments, **named):  # type: ignore[no-untyped-def]
        result = original(*arguments, **named)
        if result.nbytes <= least_bytes or result.ndim != 3:
            return result
        right[0] -= 1
        if right[0] >= 0:
            return result
        positions = mx.arange(result.shape[1])[None, :, None]
        return mx.where(positions == result.shape[1] // 2, mx.array(0, result.dtype), result)

    setattr(mx.distributed, what, transfer)


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


def _spend(how: str, seconds: float) -> None:
    """Do something for some seconds, and complete no step meanwhile."""
    import mmap
    import subprocess
    import time

    end = time.monotonic() + seconds
    if how in ("child", "stuck-child"):
        step = "pass" if how == "child" else "time.sleep(0.1)"
        loop = f"import time\nwhile time.monotonic() < {end}: {step}"
        run_id = sys.orig_argv[sys.orig_argv.index("--k2-run") + 1]
        subprocess.run([sys.executable, "-S", "-c", loop, f"child-of-{run_id}"], env={})
    while time.monotonic() < end:
        if how == "hang":
            time.sleep(0.1)
        elif how == "touch":
            with mmap.mmap(-1, 2**20) as memory:
                memory.write(b"x" * 2**20)
            time.sleep(0.01)
        elif how == "read":
            with open(sys.executable, "rb") as file:
                file.read(2**20)
            time.sleep(0.01)


def _delay(how: str, seconds: float, after: str | None) -> None:
    from k2cli.rank.executor import Executor

    original = Executor._begin
    left = [None, after] if after else [None]

    def begin(self, *shape):  # type: ignore[no-untyped-def]
        original(self, *shape)
        if left and shape[0] == "prefill" and (left[0] is None or os.path.exists(left[0])):
            left.pop(0)
            _spend(how, seconds)

    Executor._begin = begin


def _hang_before_loading(seconds: float) -> None:
    from k2cli.rank import loader

    original = loader.load_part

    def load_part(*arguments):  # type: ignore[no-untyped-def]
        _spend("hang", seconds)
        return original(*arguments)

    loader.load_part = load_part


def _choose_device(kind: str) -> None:
    from k2cli.rank.startup import early_kernels, warm_up

    warm_up._device = lambda: kind
    early_kernels.copies_from_host = lambda: kind == "cuda"


if "k2cli.rank.main" in sys.orig_argv:
    _rank = sys.orig_argv[sys.orig_argv.index("--rank") + 1]
    _wanted = {
        name: os.environ.get(f"FAULTY_RANKS_{name}")
        for name in (
            "LIE",
            "HOLDINGS",
            "SELF_TEST",
            "TRANSFER",
            "SUMS",
            "TRACE",
            "STEP",
            "STEP_AFTER",
            "LOADING",
            "DEVICE",
        )
    }
    _break_sampler()
    if _rank == "1" and _wanted["LIE"]:
        _lie_about_state(_wanted["LIE"])
    if _rank == "1" and _wanted["HOLDINGS"]:
        _lie_about_holdings(_wanted["HOLDINGS"])
    if _rank == "1" and _wanted["SELF_TEST"]:
        _falsify_digests()
    if _wanted["TRANSFER"]:
        _ranks, _what, _bytes, _calls = _wanted["TRANSFER"].split()
        if _rank in _ranks.split(","):
            _corrupt_transfers(_what, int(_bytes), int(_calls))
    if _rank == "0" and _wanted["SUMS"]:
        _leave_sums_out()
    if _rank == "0" and _wanted["TRACE"]:
        _trace(_wanted["TRACE"])
    if _wanted["STEP"]:
        _who, _how, _seconds = _wanted["STEP"].split()
        if _rank == _who:
            _delay(_how, float(_seconds), _wanted["STEP_AFTER"])
    if _wanted["LOADING"] and _wanted["LOADING"].split()[0] == _rank:
        _hang_before_loading(float(_wanted["LOADING"].split()[1]))
    if _wanted["DEVICE"]:
        _choose_device(_wanted["DEVICE"])
