"""Values allowed in options and documents, each list once."""

from __future__ import annotations

from typing import Literal

Transport = Literal["local", "mpi", "ring", "jaccl", "nccl"]
"""Connection between the ranks of a run; ``--backend`` and the JSON field ``backend`` of a run."""

Device = Literal["metal", "cuda", "cpu"]
"""Processor that a machine computes on; the JSON field ``backend`` of a machine."""

LinkTransport = Literal["ring", "jaccl", "tcp"]
"""Protocol that a link is measured with: a transport, or plain TCP."""

Strategy = Literal["single", "pipeline", "tensor"]
FloatType = Literal["float32", "bfloat16", "float16"]
HeadPlacement = Literal["replicated", "sharded"]
KvBits = Literal[0, 8, 4]
"""Bits of quantized keys and values; 0 if they are not quantized."""

Speculation = Literal["off", "auto", "always"]
"""Drafts of an answer's next tokens, verified in one step: never, where they pay, or always."""

DRAFT_LENGTHS = (3, 7, 15)
"""Tokens of a draft. There are few lengths, since a GPU may compile kernels for each; with the
input, steps are as long as tiles of matrix kernels."""

MOST_VERIFIED_TOKENS = 1 + DRAFT_LENGTHS[-1]
"""Tokens of the longest step that verifies a draft."""

Certainty = Literal["exact", "modelled", "assumed"]
"""Origin of a number: traced or read, computed by a model, or taken as given."""

# Values of options; ``auto`` leaves the choice to k2.
WantedTransport = Literal["auto", Transport]
CheckedTransport = Literal["auto", "mpi", "ring", "jaccl", "nccl"]
Parallel = Literal["auto", Strategy]
WantedLinkCheck = Literal["auto", "always", "never"]
WantedFloatType = Literal["auto", FloatType]
Head = Literal["auto", HeadPlacement]

# Names in ``server.output.known_formats``, with those that vLLM and SGLang have for the same;
# ``none`` leaves calls or reasoning in the text.
TOOL_PARSERS = (
    "none", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "function_gemma",
    "gemma4", "glm4", "glm45", "glm47", "gpt_oss", "harmony", "hermes", "json_tools",
    "kimi_k2", "kimi_k3", "laguna", "llama3", "llama3_json", "llama4", "llama4_pythonic",
    "longcat", "minicpm5", "minimax", "minimax_m2", "mistral", "muse_spark", "openai",
    "pythonic", "qwen3", "qwen3_coder", "qwen3_xml",
)  # fmt: skip
REASONING_PARSERS = (
    "none", "deepseek_r1", "deepseek_v3", "gemma4", "glm45", "gpt_oss", "harmony", "kimi_k2",
    "kimi_k3", "longcat", "minimax_m2", "mistral", "openai", "qwen3", "seed", "seed_oss",
    "think", "think_marks", "think_open",
)  # fmt: skip
