"""schemathesis against a server: requests drawn from the OpenAPI document, valid and not."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MINUTE = 60.0

# The document cannot say all rules, such as fields that exclude each other, so valid data may be
# refused. A POST that does not declare JSON is refused before its route is looked for.
NOT_CHECKED = ("positive_data_acceptance", "unsupported_method", "ignored_auth")


@dataclass(frozen=True, slots=True)
class Fuzzed:
    """What schemathesis found: its report, and its exit status, 0 if nothing."""

    status: int
    cases: int
    report: str


def fuzz(
    url: str, folder: Path, *, phases: str, examples: int, seconds: int, seed: int, workers: int = 1
) -> Fuzzed:
    """Send requests and check the answers: no 500, none later than a minute, as documented.

    Args:
        url: address of the server, without ``/v1``.
        folder: a working directory; schemathesis keeps a database of examples in it.
        phases: of schemathesis: ``coverage`` tries the limits of each field, ``fuzzing`` draws.
        examples: requests for each route.
        seconds: time for all.
        seed: the same seed draws the same requests.
        workers: requests at a time.
    """
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json",
        "--phases", phases, "--max-examples", str(examples), "--max-time", str(seconds),
        "--seed", str(seed), "--workers", str(workers), "--request-timeout", str(MINUTE),
        "--exclude-checks", ",".join(NOT_CHECKED), "--suppress-health-check", "all",
        "--continue-on-failure", "--no-shrink", "--warnings", "off",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=seconds + 5 * MINUTE
    )
    report = done.stdout + done.stderr
    cases = re.search(r"(\d+) generated", report)
    return Fuzzed(done.returncode, int(cases[1]) if cases else 0, report)
