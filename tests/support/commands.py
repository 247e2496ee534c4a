"""Commands of k2, run as a user does, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

K2 = [sys.executable, "-m", "k2cli"]
_SECONDS = 200


def k2(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``k2 arguments`` to its end, with nothing on its standard input."""
    return subprocess.run(
        [*K2, *arguments],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
    )


def downloaded(*arguments: str, **environment: str) -> Path:
    """Run ``k2 download arguments``; return the folder of the model."""
    done = k2("download", *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["path"])
