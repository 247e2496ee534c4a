"""Output of ``k2 connect``: settings to copy on stdout, everything about them on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from k2cli.ui.output import note, print_text

if TYPE_CHECKING:
    from k2cli.connect.config_file import PlannedChange, Written
    from k2cli.connect.describe import Description


def print_settings(described: Description, run_id: str | None, again: str) -> None:
    """Print what a user sets, and which commands of k2 do it.

    Args:
        again: the command line that printed it.
    """
    agent, endpoint = described.agent, described.endpoint
    of_run = f", run {run_id}" if run_id else ""
    context = f", {endpoint.context_tokens:,} tokens" if endpoint.context_tokens else ""
    note(f"{agent.title}: {endpoint.model} at {endpoint.url}{of_run}{context}")
    if agent.set_by == "environment":
        for line in described.exports:
            print_text(line)
        if described.start:
            note(f"then: {described.start}")
    else:
        for file in described.files:
            note(f"in {file.path}:")
            print_text(file.text, end="")
        print_start(described)
    print_notes(described)
    _print_ways(described, again)


def _print_ways(described: Description, again: str) -> None:
    agent = described.agent
    if described.files:
        note(f"to write it:  {again} --write")
    if agent.environment_suffices and agent.program:
        note(f"to run it so: {again} -- {agent.program}")
    elif not agent.program:
        note(f'in a shell:   eval "$({again})"')


def print_change(planned: PlannedChange, difference: str) -> None:
    """Print what changes in a file."""
    if planned.target != planned.path:
        note(f"{planned.path} is a link to {planned.target}, which is changed")
    print_text(difference, end="")


def print_written(written: Written) -> None:
    """Say what was written, and how to get the old file back."""
    note(f"written: {written.path}")
    if written.copy is not None:
        note(f"the old file is {written.copy}")
    note(f"to undo: {written.undo}")


def print_start(described: Description) -> None:
    """Say how the configured agent is started, on stderr."""
    if described.exports_written:
        note("in the shell that starts it:")
        for line in described.exports_written:
            note(f"  {line}")
    if described.start_written:
        note(f"then: {described.start_written}")


def print_notes(described: Description) -> None:
    """Print what the user should know about the agent and the run."""
    for text in described.notes:
        note(f"note: {text}")
