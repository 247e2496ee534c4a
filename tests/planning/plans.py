"""Plans in one call, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.plan import Plan
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest


def make_plan(reference: str, nodes: Sequence[NodeMemory], **options: Any) -> Plan:
    """Plan a model with the given fields of a ``PlanRequest``."""
    return Planner(reference).plan(nodes, PlanRequest(**options))
