"""Arrays that ranks exchange through the MLX group: hidden states, inputs of steps, and sums.

Hidden states travel from the higher rank (earlier stage) to the lower one, on a stream of their
own, so that sending those of one step does not delay computing the next.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from k2cli.errors import UsageError
from k2cli.rank.host_buffers import copies_from_host
from k2cli.sharding.stage import Stage, hidden_at


class Exchange:
    """The transfers and sums of one rank; one that is alone has no group."""

    def __init__(self, stage: Stage, group: Any | None) -> None:
        self._stage = stage
        self._group = group
        self.is_pipeline = not (stage.is_first and stage.is_last)
        """True if hidden states go from rank to rank."""
        self.sums = group is not None and group.size() > 1 and not self.is_pipeline
        """True if a step has sums over all ranks."""
        self._host_copies = copies_from_host()
        self._transfers = mx.new_stream(mx.cpu)
        # What is being sent must not be released before.
        self._departing: mx.array | None = None
        self._fed: mx.array | None = None
        self._hidden: tuple[int, mx.Dtype] | None = None
        self._nothing = mx.zeros((1,), dtype=mx.float32)
        mx.eval(self._nothing)

    # --- hidden states of a pipeline -------------------------------------------------------------

    def receive(self, rows: int, length: int) -> mx.array | None:
        """Receive hidden states from the previous stage, lazily: ``[rows, length, width]``."""
        if self._stage.is_first:
            return None
        assert self._group is not None
        return mx.distributed.recv(
            (rows, length, self._stage.width),
            self._stage.dtype,
            self._group.rank() + 1,
            group=self._group,
            stream=self._transfers,
        )

    def send(self, output: mx.array) -> None:
        """Start sending computed hidden states ``[rows, length, width]`` to the next stage."""
        assert self._group is not None
        self._departing = mx.distributed.send(
            output, self._group.rank() - 1, group=self._group, stream=self._transfers
        )
        mx.async_eval(self._departing)  # type: ignore[no-untyped-call]

    # --- inputs of steps that are decided ahead --------------------------------------------------

    def feed_ahead(self, chosen: mx.array) -> None:
        """Send the inputs of a step decided ahead from a pipeline's leader to its first stage.

        Args:
            chosen: uint32 ``[rows]``, lazy.
        """
        assert self._group is not None
        self._fed = mx.distributed.send(
            self._to_host(chosen),
            self._group.size() - 1,
            group=self._group,
            stream=self._transfers,
        )
        mx.async_eval(self._fed)  # type: ignore[no-untyped-call]

    def inputs_ahead(self, rows: int, chosen: mx.array | None) -> mx.array:
        """Return the inputs of a step decided ahead, lazily: uint32 ``[rows]``.

        Tensor ranks get them as a sum over ranks, to which all but the leader contribute zeros.
        Only the first stage of a pipeline uses their values; other stages use their shape alone.
        """
        nothing = mx.zeros((rows,), dtype=mx.uint32)
        if self._group is None or self._group.size() == 1:
            assert chosen is not None
            return chosen
        if not self.is_pipeline:
            own = nothing if chosen is None else self._to_host(chosen)
            return mx.distributed.all_sum(own, group=self._group)
        if not self._stage.is_first:
            return nothing
        return mx.distributed.recv((rows,), mx.uint32, 0, group=self._group, stream=self._transfers)

    def _to_host(self, value: mx.array) -> mx.array:
        """Prepare an array that the GPU may still be computing for a transfer by the CPU.

        On CUDA a transfer takes its input to host memory when it is scheduled, and frees the GPU's
        memory. Kernels of the same evaluation are waited for, those of an earlier one are not:
        they would write to freed memory, and what was sent would be arbitrary. So the transfer
        gets a copy, which is computed in its own evaluation.
        """
        return value + mx.array(0, value.dtype) if self._host_copies else value

    # --- sums of tensor ranks --------------------------------------------------------------------

    def meet(self) -> None:
        """Wait until every tensor rank has come here: in this call, and not in a sum of the step.

        There the GPU would wait, and macOS ends a GPU that waits some five seconds for another
        rank (mlx-examples#1185).
        """
        mx.eval(mx.distributed.all_sum(self._nothing, group=self._group))

    def in_step(self, step: int, computed: mx.array) -> mx.array | None:
        """Detect tensor ranks that have lost step with each other.

        Collectives are matched by their order alone. A rank that ran one too many or too few would
        add up unrelated arrays from then on, without any error, and compute wrong text. So every
        rank contributes a number derived from the step; the result is a lazy bool, True if the sum
        is ``size * number``. This sum comes last in the step and has the shape of the others: with
        another shape a rank out of step would hang instead.
        """
        if self._group is None or not self.sums:
            return None
        width, dtype = self._hidden = self._hidden or _hidden_of(self._stage)
        size = self._group.size()
        # Integers up to 256 are exact in every float type that hidden states have.
        number = step % (256 // size) + 1
        shape = (*computed.shape[:-1], width) if computed.ndim == 3 else (len(computed), 1, width)
        own = mx.depends(mx.full(shape, number, dtype=dtype), computed)
        return mx.all(mx.distributed.all_sum(own, group=self._group) == size * number)


def _hidden_of(stage: Stage) -> tuple[int, mx.Dtype]:
    """Return width and dtype of what tensor ranks sum; arbitrary if layers exchange more."""
    try:
        return hidden_at(stage.model, 0)
    except UsageError:
        return 1, mx.float32
