"""Calls for several nodes at once that Ctrl-C can end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from k2cli.nodes.ssh_connection import end_running_commands

Item = TypeVar("Item")
Result = TypeVar("Result")
_AT_ONCE = 16


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Call a function for every item at once; yields the results in the order of completion.

    If the consumer stops or is interrupted, or a call fails, the commands that still run on nodes
    are ended, so that no thread takes longer than it needs to clean up.
    """
    pool = ThreadPoolExecutor(min(_AT_ONCE, max(len(items), 1)))
    futures = [pool.submit(function, item) for item in items]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        end_running_commands()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call a function for every item at once; returns the results in the order of the items."""
    calls = in_parallel(lambda pair: (pair[0], function(pair[1])), list(enumerate(items)))
    return [result for _, result in sorted(calls, key=lambda pair: pair[0])]
