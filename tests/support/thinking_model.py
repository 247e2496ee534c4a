"""The toy of Kimi K2 with the chat templates of its models that think."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.toy_k2.template import K25_TEMPLATE, THINKING_TEMPLATE

TEMPLATES = {"k2-thinking": THINKING_TEMPLATE, "k2.5": K25_TEMPLATE}
REASONING_BEGINS = {"k2-thinking": "<think>", "k2.5": ""}
"""What an answer begins with: the template of K2.5 opens the reasoning itself."""


def thinking_model(toy: Path, folder: Path, name: str = "k2-thinking") -> Path:
    """Copy a toy of K2 into a new folder and give it the template of a model that thinks."""
    shutil.copytree(toy, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    return folder
