"""The values that options and documents choose from, each list once."""

from __future__ import annotations

from typing import Literal

Transport = Literal["local", "mpi", "ring", "jaccl"]
"""What connects the ranks of a run; ``--backend`` and the JSON field ``backend`` of a run."""

Device = Literal["metal", "cuda", "cpu"]
"""What a machine computes on; the JSON field ``backend`` of a machine."""

LinkTransport = Literal["ring", "jaccl", "tcp"]
"""What a link is measured with: a transport, or plain TCP."""

Strategy = Literal["single", "pipeline", "tensor"]
FloatType = Literal["float32", "bfloat16", "float16"]
HeadPlacement = Literal["replicated", "sharded"]

# What a user asks for: ``auto`` leaves the choice to k2.
WantedTransport = Literal["auto", Transport]
Parallel = Literal["auto", Strategy]
WantedFloatType = Literal["auto", FloatType]
Head = Literal["auto", HeadPlacement]


Certainty = Literal["exact", "modelled", "assumed"]


"""How a number came about: traced or read, computed by a model, or taken as given."""
