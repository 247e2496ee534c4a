"""The ids of runs: readable, and of one run alone."""

from __future__ import annotations

import re
import secrets

from k2cli.settings import runs_directory


def new_run_id(model_name: str) -> str:
    """A readable id that no run has yet, such as ``demo-3f9a``."""
    words = re.sub(r"[^a-z0-9]+", "-", model_name.rsplit("/", 1)[-1].lower()).strip("-")
    while True:
        run_id = f"{words[:24].strip('-') or 'run'}-{secrets.token_hex(2)}"
        if not (runs_directory() / run_id).exists():
            return run_id
