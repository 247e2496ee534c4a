"""The same question to several nodes at once, in a way that Ctrl-C can end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from k2cli.nodes.ssh_connection import end_running_commands

Item = TypeVar("Item")
Result = TypeVar("Result")
_AT_ONCE = 16


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Call a function for every item; yields the results as they come.

    Where the consumer is interrupted, or stops, commands that run on nodes are given up, so that
    no thread is waited for longer than it needs to clean up.
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
