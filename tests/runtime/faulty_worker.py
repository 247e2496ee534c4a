"""A real rank with one fault, for tests: started like ``k2cli.runtime.worker``.

``K2_TEST_FAULT`` says which: ``digest`` lets a follower misreport what it holds, ``sampler``
raises inside the sampler of requests with seed 666.
"""

from __future__ import annotations

import os

import mlx.core as mx

from k2cli.runtime import sampling, worker
from k2cli.runtime.caches import CacheTable


def _lie_about_state() -> None:
    original = CacheTable.digest

    def digest(self: CacheTable, step: int) -> str:
        # The canary is passed; after it, this rank believes to hold something else.
        return original(self, step) if step < 20 else "0" * 16

    CacheTable.digest = digest  # type: ignore[method-assign]


def _raise_in_one_sampler() -> None:
    original = sampling.Sampler.pick

    def pick(self: sampling.Sampler, logits: mx.array) -> mx.array:
        if self.options.seed == 666:
            raise ValueError("the sampler of this request is broken")
        return original(self, logits)

    sampling.Sampler.pick = pick  # type: ignore[method-assign]


if __name__ == "__main__":
    match os.environ["K2_TEST_FAULT"]:
        case "digest":
            if os.environ["MLX_RANK"] == "1":
                _lie_about_state()
        case "sampler":
            _raise_in_one_sampler()
    worker.main()
