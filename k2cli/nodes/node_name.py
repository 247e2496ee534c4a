"""Names of nodes, in a module of its own because reading the record of a run needs nothing else."""

from __future__ import annotations

import re

_NAME = re.compile(r"[^-\s,\x00-\x1f\x7f][^\s,\x00-\x1f\x7f]*")


def is_node_name(name: str) -> bool:
    """True if ssh can take the name for a host: it takes "-x" for an option."""
    return _NAME.fullmatch(name) is not None
