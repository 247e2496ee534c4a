"""Puts faults into real ranks, for tests: Python imports this by itself where it is on the path.

Only ranks are touched. The sampler of requests with seed 666 raises. Rank 1 reports a wrong digest
of what it holds from when the file named by ``FAULTY_RANKS_LIE`` exists.
"""

from __future__ import annotations

import os
import sys


def _break_sampler() -> None:
    from k2cli.runtime import sampling

    original = sampling.Sampler.pick

    def pick(self, logits):  # type: ignore[no-untyped-def]
        if self.options.seed == 666:
            raise ValueError("the sampler of this request is broken")
        return original(self, logits)

    sampling.Sampler.pick = pick


def _lie_about_state(trigger: str) -> None:
    from k2cli.runtime.caches import CacheTable

    original = CacheTable.digest

    def digest(self, step):  # type: ignore[no-untyped-def]
        return "0" * 16 if os.path.exists(trigger) else original(self, step)

    CacheTable.digest = digest


if "k2cli.runtime.worker" in sys.orig_argv:
    _break_sampler()
    trigger = os.environ.get("FAULTY_RANKS_LIE")
    if trigger and sys.orig_argv[sys.orig_argv.index("--rank") + 1] == "1":
        _lie_about_state(trigger)
