"""Stored tensors that lazy arrays are computed from, so that they can be read before.

mlx reads files on a processor's stream, and a GPU that computes with what is read waits for it. On
Metal it does so within a command buffer that is already committed, and macOS ends those after some
five seconds: loading from a USB disk or a busy one fails with ``Caused GPU Timeout Error``
(ml-explore/mlx#3803; ollama/ollama#17998 has the same remedy). So the tensors are read first. On
CUDA mlx reads when it submits an operation, and no GPU waits.

mlx tells the graph of lazy arrays only as text, in the language of Graphviz. It names each operation
by its address, which belongs to it alone while the arrays are held.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import mlx.core as mx

_READ = re.compile(r'^\{ (\d+) \[label ="Load"', re.MULTILINE)


def gpu_waits_for_reads() -> bool:
    """True if a GPU may be ended for waiting until a file is read."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


class FileReads:
    """The reads of lazily opened tensors, to do those that lazy arrays need.

    Make it before any of the tensors is evaluated.
    """

    def __init__(self, opened: Iterable[mx.array]) -> None:
        self._tensors = {address: tensor for tensor in opened for address in _reads(tensor)}

    def read_for(self, *arrays: mx.array) -> int:
        """Read the tensors that lazy arrays are computed from; return the number read.

        What has been read is held by the arrays alone, until they are evaluated.
        """
        addresses = dict.fromkeys(address for array in arrays for address in _reads(array))
        found = [self._tensors.pop(address) for address in addresses if address in self._tensors]
        mx.eval(found)
        return len(found)


def _reads(array: mx.array) -> list[str]:
    text = io.StringIO()
    mx.export_to_dot(text, array)
    return _READ.findall(text.getvalue())
