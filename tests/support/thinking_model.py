"""The toy of Kimi K2 with the chat template of K2-Thinking."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.toy_k2.template import THINKING_TEMPLATE


def thinking_model(toy: Path, folder: Path) -> Path:
    """Copy a toy of K2 into a new folder and give it the template of K2-Thinking."""
    shutil.copytree(toy, folder)
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE, encoding="utf-8")
    return folder
