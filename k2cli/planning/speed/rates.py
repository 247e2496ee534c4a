"""What a machine achieves: the rates by which work becomes time. A leaf of planning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeRates:
    """What a machine achieves, per second, and what a layer costs beside its bytes, in seconds.

    ``dense``, ``expert`` and ``attention`` are operations per second of a prompt's matrices that
    all tokens share, of matrices that the tokens are spread over, and of attention.
    ``rows_share`` is what several requests' tokens, decoded together, reach of a prompt's rates,
    ``decode_attention_share`` what a single token's attention reaches of a prompt's.
    """

    read_bytes_per_second: float
    dense_flops_per_second: float
    expert_flops_per_second: float
    attention_flops_per_second: float
    dense_layer_seconds: float
    expert_layer_seconds: float
    rows_share: float = 1.0
    decode_attention_share: float = 1.0

    def shared_by(self, ranks: int) -> NodeRates:
        """The rates of one of several ranks that compute at the same time on one machine."""
        return NodeRates(
            self.read_bytes_per_second / ranks,
            self.dense_flops_per_second / ranks,
            self.expert_flops_per_second / ranks,
            self.attention_flops_per_second / ranks,
            self.dense_layer_seconds,
            self.expert_layer_seconds,
            self.rows_share,
            self.decode_attention_share,
        )


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """What ``k2 bench --calibrate`` found of a machine and of the link between its run's ranks.

    ``collective_seconds`` is None after a run of one rank. ``source`` says when and with what;
    ``deviation`` is what repetitions differed by, as the standard deviation of their logarithms.
    """

    rates: NodeRates
    collective_seconds: float | None
    source: str
    deviation: float = 0.0
