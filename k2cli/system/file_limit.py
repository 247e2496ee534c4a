"""The limit on open files of this process and those that it starts: 256 in a Mac's terminal.

Guards have connections, and a checkpoint of a trillion parameters has hundreds of files.
"""

from __future__ import annotations

import resource

_WANTED_FILES = 8192


def raise_file_limit() -> int:
    """Raise the limit on open files as far as is allowed and useful.

    Returns:
        The limit that holds now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS refuses more than its kern.maxfilesperproc
            return soft
        return wanted
    return soft
