"""Runs k2's own client commands as a user does, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

SECONDS = 60


def run_k2(*arguments: str, stdin: str | None = None, **environment: str) -> Any:
    """Run ``k2 arguments``; the result has stdout, stderr and returncode."""
    return subprocess.run(
        [sys.executable, "-m", "k2cli", *arguments],
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **environment},
    )
