"""A program in the place of a rank: it keeps what MLX is told by its environment.

Started by ``mlx.launch``, where it ends then, and by k2's guards, where it waits to be ended: the
end of one rank is the end of all. A value that is a file's name is replaced by what it holds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def _value(text: str) -> object:
    path = Path(text)
    return json.loads(path.read_text()) if path.is_file() or path.is_fifo() else text


def main() -> None:
    found = {name: _value(text) for name, text in os.environ.items() if name.startswith("MLX_")}
    path = Path.home() / f"environment-{found['MLX_RANK']}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(found))
    partial.rename(path)
    if "--guard-fd" in sys.argv:
        signal.pause()


if __name__ == "__main__":
    main()
