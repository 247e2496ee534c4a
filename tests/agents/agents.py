"""The coding agents that are tried: their versions, their options for one edit, their tools.

``k2 connect`` points them at the run, as it does for users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.scripted_answers import Rule

MODEL = "scripted"
"""The name under which a scripted run serves its model."""
FILE = "greet.py"
BEFORE = 'def greeting(name):\n    return "Hello"\n'
AFTER = 'def greeting(name):\n    return "Hello from K2"\n'
TASK = f"In {FILE}, change Hello to Hello from K2."
FINAL = "The greeting now says Hello from K2."


@dataclass(frozen=True, slots=True)
class Call:
    """A call of one of the agent's own tools; ``{file}`` in an argument is the file's path."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Agent:
    """One coding agent.

    Attributes:
        name: for ``k2 connect``.
        package: what npm or pip installs, without the version.
        program: name of the program that the package installs.
        arguments: of a run without a terminal that makes one edit.
        calls: what the scripted model calls, one call for each turn.
        answer: the edit as text, for an agent without tools.
        environment: variables that keep the agent from asking the internet.
        path: of the requests that the agent sends.
        installer: ``npm`` or ``pip``.
        install_script: of the package, which has to run once after npm.
    """

    name: str
    package: str
    version: str
    program: str
    arguments: tuple[str, ...]
    path: str
    calls: tuple[Call, ...] = ()
    answer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    installer: str = "npm"
    install_script: str = ""

    def rules(self, folder: Path, opens: str = "<think>") -> list[Rule]:
        """Return the answers of a model that makes the edit in a folder.

        Args:
            folder: the agent's working folder.
            opens: what the model writes before its reasoning.
        """
        if not self.calls:
            return [Rule(f"{opens}One line changes.</think>{self.answer}")]
        # The last call's result is looked for first: a conversation holds all earlier ones.
        last = self.calls[-1]
        rules = [
            Rule(
                f"{opens}The file is changed.</think>{FINAL}",
                (f"## Return of functions.{last.tool}:{len(self.calls) - 1}\n",),
            )
        ]
        for index in reversed(range(len(self.calls))):
            needed = ["<|im_system|>tool_declare"]
            if index:
                before = self.calls[index - 1].tool
                needed.append(f"## Return of functions.{before}:{index - 1}\n")
            answer = opens + _calling(self.calls[index], index, folder / FILE)
            rules.append(Rule(answer, tuple(needed)))
        rules.append(Rule(f"{opens}Short.</think>Change of a greeting"))  # titles: no tools
        return rules


def _calling(call: Call, index: int, file: Path) -> str:
    arguments = json.dumps(call.arguments).replace("{file}", str(file))
    return (
        f"The next step is {call.tool}.</think>I use {call.tool}."
        "<|tool_calls_section_begin|><|tool_call_begin|>"
        f"functions.{call.tool}:{index}<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    )


CLAUDE_CODE = Agent(
    name="claude",
    package="@anthropic-ai/claude-code",
    version="2.1.332",
    program="claude",
    install_script="install.cjs",
    arguments=("-p", "--permission-mode", "acceptEdits", TASK),
    path="/v1/messages",
    calls=(
        Call("Read", {"file_path": "{file}"}),
        Call(
            "Edit",
            {"file_path": "{file}", "old_string": "Hello", "new_string": "Hello from K2"},
        ),
    ),
)

CODEX = Agent(
    name="codex",
    package="@openai/codex",
    version="0.171.0",
    program="codex",
    arguments=("exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", TASK),
    path="/v1/responses",
    calls=(
        Call("exec_command", {"cmd": "cat {file}"}),
        Call("exec_command", {"cmd": "sed -i 's/Hello/Hello from K2/' {file}"}),
    ),
)

OPENCODE = Agent(
    name="opencode",
    package="opencode-ai",
    version="1.18.33",
    program="opencode",
    install_script="postinstall.mjs",
    arguments=("run", TASK),
    path="/v1/chat/completions",
    calls=(
        Call("read", {"filePath": "{file}"}),
        Call("edit", {"filePath": "{file}", "oldString": "Hello", "newString": "Hello from K2"}),
    ),
    environment={"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"},
)

CLINE = Agent(
    name="cline",
    package="cline",
    version="3.0.65",
    program="cline",
    install_script="postinstall.mjs",
    arguments=(TASK,),
    path="/v1/chat/completions",
    calls=(
        Call("read_files", {"files": [{"path": "{file}"}]}),
        Call(
            "editor",
            {
                "command": "str_replace",
                "path": "{file}",
                "old_text": "Hello",
                "new_text": "Hello from K2",
            },
        ),
    ),
)

AIDER = Agent(
    name="aider",
    package="aider-chat",
    version="0.86.2",
    program="aider",
    arguments=(
        "--no-git",
        "--no-check-update",
        "--no-show-release-notes",
        "--analytics-disable",
        "--yes-always",
        "--message",
        TASK,
        FILE,
    ),
    path="/v1/chat/completions",
    answer=(
        f'{FILE}\n```python\n<<<<<<< SEARCH\n    return "Hello"\n=======\n'
        '    return "Hello from K2"\n>>>>>>> REPLACE\n```\n'
    ),
    installer="pip",
)

CONTINUE = Agent(
    name="continue",
    package="@continuedev/cli",
    version="1.5.47",
    program="cn",
    arguments=("-p", "--auto", TASK),
    path="/v1/chat/completions",
    calls=(
        Call("Read", {"filepath": "{file}"}),
        Call(
            "Edit",
            {"file_path": "{file}", "old_string": "Hello", "new_string": "Hello from K2"},
        ),
    ),
)

AGENTS: Sequence[Agent] = (CLAUDE_CODE, CODEX, OPENCODE, CLINE, AIDER, CONTINUE)
