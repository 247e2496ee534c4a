"""Calls in threads that are all waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def all_in_threads(*calls: Callable[[], None]) -> None:
    """Make calls at the same time, and wait for all of them even if one fails.

    A bootstrap that is written to a slow node after the attempt has failed on another one would
    come after the removal of all bootstraps, and stay, with the run's secret.

    Raises:
        ClusterError: that of the first call that failed.
    """
    found = await asyncio.gather(*map(asyncio.to_thread, calls), return_exceptions=True)
    for problem in found:
        if isinstance(problem, BaseException):
            raise problem
