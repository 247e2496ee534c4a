"""Runs that are for one check alone: once they are over, they are no runs of the user's any more.

A check run is listed while it lives, so that it can be watched and stopped. It is kept if it
failed, since its log tells why, and if processes of it may be left.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

from k2cli.runs.lease import take_over

if TYPE_CHECKING:
    from k2cli.runs.record import RunRecord


def is_over(record: RunRecord) -> bool:
    """True for a check run that has ended without a failure, and of which nothing is left."""
    return record.ends_with_check and record.state in ("stopped", "lost") and not record.left


def forget(record: RunRecord) -> None:
    """Remove the folder of a check run that is over, unless its check or supervisor still ends."""
    if record.has_supervisor:
        return
    with contextlib.suppress(OSError):  # the next one who lists the runs removes it
        lease = take_over(record.folder)
        if lease is not None:
            with contextlib.closing(lease):
                shutil.rmtree(record.folder)
