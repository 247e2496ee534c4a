"""The k2 program run in this process, for tests of its output: a process takes half a second."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from k2cli.cli import main

ROOT = Path(__file__).resolve().parents[2]


def k2_here(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``k2`` from the repository's root and return the result that a process would give.

    Its streams are not terminals, and take UTF-8.
    """
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    code: int | str | None = 0
    with (
        contextlib.chdir(ROOT),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["k2", *arguments]),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    said = []
    for stream in streams:
        stream.seek(0)
        said.append(stream.read())
    assert code is None or isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code or 0, *said)
