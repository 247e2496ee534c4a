"""The endpoint that an agent is pointed at: a run's address, model, limits and key."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.units import one_line

KEY_VARIABLE = "K2_API_KEY"
PLACEHOLDER_KEY = "none"
"""Sent to a run that asks for no key, by agents that refuse to start without one."""

_MOST_OUTPUT_TOKENS = 32_768
_MODEL_NAME = re.compile(r"[^\W_][\w .,:/@+()\[\]-]{0,199}")


def checked_model_name(name: str) -> str:
    """Return the name of a model that can be put into a configuration.

    A server chooses the name, and agents replace parts of a value: opencode reads a file for
    ``{file:PATH}``, Continue a secret for ``${{ secrets.NAME }}``, and would send it as the name.

    Raises:
        K2Error: if the name has characters that could mean something to an agent.
    """
    if _MODEL_NAME.fullmatch(name):
        return name
    raise K2Error(
        f"the name of the model, '{one_line(name)[:200]}', has characters that could mean "
        "something else in the configuration of an agent",
        "give it a plain name: k2 launch MODEL --alias NAME, and k2 connect --model NAME",
    )


@dataclass(frozen=True, slots=True)
class Key:
    """The key of a run.

    Attributes:
        value: the key itself, which must not be printed or be on a command line.
        command: prints the key; it stays right where configurations and shells name it.
    """

    value: str = field(repr=False)
    command: tuple[str, ...]

    @property
    def command_line(self) -> str:
        """Return the command for a POSIX shell."""
        return shlex.join(self.command)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A run as its clients see it.

    Attributes:
        url: the address without ``/v1``.
        model: the name of the model in requests.
        context_tokens: most tokens of prompt and answer together; None if the server does not say.
        tools: True if the model's template knows tools.
        reasoning: True if the model reasons before it answers.
        key: None if the run asks for none.
        authority: file with the certificate to trust; None if the system knows it, or without TLS.
    """

    url: str
    model: str
    context_tokens: int | None = None
    tools: bool = True
    reasoning: bool = False
    key: Key | None = None
    authority: Path | None = None

    @property
    def base_url(self) -> str:
        """Return the address that clients of OpenAI's API want."""
        return f"{self.url}/v1"

    @property
    def output_tokens(self) -> int | None:
        """Return the longest answer to ask for: a quarter of the context, within reason.

        Agents shorten a conversation once the prompt and this no longer fit.
        """
        if self.context_tokens is None:
            return None
        return max(1, min(_MOST_OUTPUT_TOKENS, self.context_tokens // 4))
