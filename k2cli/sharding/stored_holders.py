"""The ranks that read each stored tensor, so that a machine gets the files of its own ranks alone.

Stored names mostly are those of parameters. Of others, which a model's class joins or renames, the
layer is known by the number in the name. A rank that needs a tensor of a file which it does not
have refuses to load (``rank.absent_files``), so that a wrong guess here cannot give wrong answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from k2cli.sharding.coverage import describe_whole, holders
from k2cli.sharding.placement import Placement
from k2cli.sharding.trace import StoredShapes, trace_model

Holders = Callable[[str], frozenset[int]]


def stored_holders(
    config: Mapping[str, Any], stored: StoredShapes, placement: Placement
) -> Holders:
    """Return a function from a stored tensor's name to the ranks that read it.

    Every rank of another placement than a pipeline reads all tensors, whole or in part.

    Raises:
        K2Error: if the config and the tensors make no model.
    """
    everybody = frozenset(range(placement.size))
    if placement.strategy != "pipeline":
        return lambda name: everybody
    whole = describe_whole(trace_model(config, stored))
    layers = whole.names.layers.rstrip(".").rpartition(".")[2]
    numbered = re.compile(rf"(?:^|\.){re.escape(layers)}\.(\d+)\.")
    ends = frozenset({0, placement.size - 1})

    def find(name: str) -> frozenset[int]:
        if name in whole.shapes:
            return frozenset(holders(name, placement, whole.names))
        if (match := numbered.search(name)) is None:
            return ends
        layer = int(match[1])
        # A number past the last layer is that of a layer for predicting more tokens, which mlx-lm
        # leaves out.
        return frozenset(p.rank for p in placement.ranks if p.layers[0] <= layer < p.layers[1])

    return find
