"""The limit on open files: 256 in a Mac's terminal, and a checkpoint of K2 has more."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
from k2cli.cli import main
sys.argv = ["k2", "--version"]
try:
    main()
finally:
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_every_command_may_open_the_files_of_a_checkpoint() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 1000
