"""The request for a plan: the room that the user wants, and how the model may be placed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k2cli.choices import (
    FloatType,
    Head,
    KvBits,
    Parallel,
    Strategy,
    WantedFloatType,
    WantedTransport,
)
from k2cli.errors import UsageError
from k2cli.planning.config_check import model_context_length
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.speed.exchange import ANSWER_TOKENS, PROMPT_TOKENS

if TYPE_CHECKING:
    from k2cli.planning.model import ModelToPlan

DEFAULT_CONTEXT_LENGTH = 32_768
MAX_CONTEXT_LENGTH = 100_000_000
MAX_CONCURRENCY = 4096
MAX_CHUNK_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A request for a plan, as the user gave it; None and ``auto`` leave the choice to k2.

    ``context_length`` is in tokens per sequence; None takes the model's maximum or 32,768,
    whichever is less. ``dtype`` ``auto`` is the checkpoint's float type, and float32 if a node
    computes on its CPU. ``head`` ``auto`` cuts the head too in tensor parallelism, if it can be
    cut. ``chunk_tokens`` is the prefill chunk. ``transport`` and ``collective_seconds`` concern the
    predicted speed; ``nccl`` also excludes a pipeline, since MLX's NCCL cannot send. With
    ``free_order`` the first node need not lead. Placements are compared by the time of a prompt of
    ``prompt_tokens`` with an answer of ``answer_tokens``. ``joins_projections``: whether ranks join
    projections of the same input; None for those of ``JOINED_ON``. ``kv_bits`` 0 leaves KV caches
    as the model keeps them.
    """

    strategy: Parallel = "auto"
    context_length: int | None = None
    concurrency: int = 1
    dtype: WantedFloatType = "auto"
    head: Head = "auto"
    chunk_tokens: int | None = None
    transport: WantedTransport = "auto"
    collective_seconds: float | None = None
    free_order: bool = False
    prompt_tokens: int = PROMPT_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    joins_projections: bool | None = None
    kv_bits: KvBits = 0

    def check(self, nodes: Sequence[NodeMemory]) -> None:
        """Refuse nonsensical amounts, no nodes, and several nodes for a strategy of one.

        Raises:
            UsageError: naming the value and what is possible.
        """
        if not nodes:
            raise UsageError("a plan needs at least one node", "--hardware '2x m3-ultra-512'")
        if self.strategy == "single" and len(nodes) > 1:
            raise UsageError(
                f"--parallel single runs on one node, not on {len(nodes)}", "name one node only"
            )
        if self.transport == "nccl" and len(nodes) > 1:
            self._check_nccl(nodes)
        self._check_kv_bits(nodes)
        if not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise UsageError(
                f"concurrency must be between 1 and {MAX_CONCURRENCY}, not {self.concurrency}",
                "--concurrency 4",
            )
        if self.chunk_tokens is not None and not 1 <= self.chunk_tokens <= MAX_CHUNK_TOKENS:
            raise UsageError(
                f"--chunk must be between 1 and {MAX_CHUNK_TOKENS} tokens, not {self.chunk_tokens}"
            )
        for option, tokens in (
            ("--prompt-tokens", self.prompt_tokens),
            ("--answer-tokens", self.answer_tokens),
        ):
            if not 1 <= tokens <= MAX_CONTEXT_LENGTH:
                raise UsageError(
                    f"{option} must be between 1 and {MAX_CONTEXT_LENGTH}, not {tokens}"
                )
        if self.collective_seconds is not None and not 0 < self.collective_seconds <= 1:
            raise UsageError(
                f"a collective takes over 0 and at most 1 s, not {self.collective_seconds:g} s",
                "--collective-latency 26us",
            )

    def shortening(self, prompt_tokens: int, answer_tokens: int, context_length: int) -> str:
        """Say that placements were compared by less than was asked for; "" if they were not.

        Args:
            prompt_tokens: the prompt that they were compared by.
            answer_tokens: its answer.
            context_length: the planned context, which holds no more.
        """
        wanted = (self.prompt_tokens, self.answer_tokens)
        if wanted in ((prompt_tokens, answer_tokens), (PROMPT_TOKENS, ANSWER_TOKENS)):
            return ""
        return (
            f"a context of {context_length:,} tokens does not hold a prompt of {wanted[0]:,} with "
            f"an answer of {wanted[1]:,}: placements are compared by {prompt_tokens:,} and "
            f"{answer_tokens:,}; --context {sum(wanted)} would hold it"
        )

    def _check_kv_bits(self, nodes: Sequence[NodeMemory]) -> None:
        gpu = next((node for node in nodes if node.device == "cuda"), None)
        if self.kv_bits and gpu is not None:
            raise UsageError(
                f"--kv-bits needs Metal or a CPU, and {gpu.name} computes with an NVIDIA GPU: MLX "
                "0.32 has no kernel there for quantized keys and values",
                "leave out --kv-bits",
            )

    def _check_nccl(self, nodes: Sequence[NodeMemory]) -> None:
        if self.strategy == "pipeline":
            raise UsageError(
                "--backend nccl has no pipeline: MLX's NCCL cannot send from rank to rank",
                "--backend ring, or --parallel tensor",
            )
        other = next((node for node in nodes if node.device != "cuda"), None)
        if other is not None:
            raise UsageError(
                f"--backend nccl joins NVIDIA GPUs, and {other.name} computes with {other.device}",
                "--backend ring",
            )

    def strategies(self, nodes: int) -> list[Strategy]:
        """Return the strategies to compare; the first of two equally good ones is preferred."""
        if nodes == 1:
            return ["single"]
        if self.strategy == "pipeline":
            return ["pipeline"]
        if self.strategy == "tensor" or self.transport == "nccl":
            return ["tensor"]
        return ["pipeline", "tensor"]

    def resolved_context(self, config: Mapping[str, Any]) -> int:
        """Return the context length to plan.

        Raises:
            UsageError: if it is not positive, or beyond the maximum of the model or of k2.
        """
        wanted, most = self.context_length, model_context_length(config)
        if wanted is None:
            return min(most or DEFAULT_CONTEXT_LENGTH, DEFAULT_CONTEXT_LENGTH)
        if wanted < 1:
            raise UsageError(f"a context has at least 1 token, not {wanted}", "--context 32768")
        if most is not None and wanted > most:
            raise UsageError(
                f"a context of {wanted:,} tokens is beyond this model's maximum of {most:,}",
                f"--context {most}",
            )
        if wanted > MAX_CONTEXT_LENGTH:
            raise UsageError(f"a context of {wanted:,} tokens is beyond {MAX_CONTEXT_LENGTH:,}")
        return wanted

    def resolved_dtype(self, model: ModelToPlan, nodes: Sequence[NodeMemory]) -> FloatType:
        """Return the float type of activations and KV cache."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if any(node.device == "cpu" for node in nodes) else model.float_type
