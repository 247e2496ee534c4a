"""The ``/commands`` of an interactive chat: a table of functions; docstrings are their help."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.chat.attachments import read_attachment, split_names
from k2cli.chat.budget import TokenCount, estimate_tokens
from k2cli.chat.compaction import INSTRUCTION, parts_to_summarize, summary_turns
from k2cli.chat.conversations import as_markdown, automatic_name
from k2cli.chat.figures import figures_line
from k2cli.chat.settings import changed, described
from k2cli.errors import K2Error
from k2cli.files import encode_json, unwritable, write_atomically
from k2cli.settings import expand_home
from k2cli.units import format_bytes

if TYPE_CHECKING:
    from k2cli.chat.interactive import Chat

Action = Callable[["Chat", str], None]
_CODE_BLOCK = re.compile(r"^ *(`{3,}|~{3,})[^\n]*\n(.*?)^ *\1[`~]* *$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its name with the arguments, the function, and what it does."""

    name: str
    arguments: str
    run: Action
    meaning: str


COMMANDS: dict[str, Command] = {}
"""The commands of this module by their names, in the order of ``/help``."""


def command(
    name: str, arguments: str = "", *others: str, table: dict[str, Command] = COMMANDS
) -> Callable[[Action], Action]:
    """Return the decorator that puts a function into a table under its names."""

    def register(run: Action) -> Action:
        meaning = " ".join((run.__doc__ or "").split("\n\n")[0].split()).rstrip(".")
        made = Command(name, arguments, run, meaning[:1].lower() + meaning[1:])
        for each in (name, *others):
            table[each] = made
        return run

    return register


@command("/help", "", "/?")
def show_help(chat: Chat, argument: str) -> None:
    """List the commands and keys."""
    commands = dict.fromkeys(chat.commands.values())
    rows = [(f"{each.name} {each.arguments}".strip(), each.meaning) for each in commands]
    chat.terminal.table([*rows, *_KEYS])


_KEYS = [
    ("@PATH", "quote a file in a message"),
    ("Alt-Enter", "begin another line of the message"),
    ('"""', "begin a message of several lines, and end it"),
    ("Tab", "complete a command, a path or a name"),
    ("Ctrl-C", "stop an answer and keep what there is"),
    ("Ctrl-D", "leave"),
]


@command("/clear", "", "/new")
def clear(chat: Chat, argument: str) -> None:
    """Begin a new conversation; the old one stays saved."""
    chat.begin_anew()
    chat.terminal.note("new conversation")


@command("/system", "[TEXT|none]")
def system(chat: Chat, argument: str) -> None:
    """Show or set the system prompt."""
    if argument:
        chat.session.system = None if argument == "none" else argument
        chat.save()
    chat.terminal.note(f"system prompt: {chat.session.system or 'none'}")


@command("/set", "[NAME VALUE]")
def set_value(chat: Chat, argument: str) -> None:
    """Show the settings, or change one until the end of the chat."""
    if not argument:
        chat.terminal.table(described(chat.settings))
        return
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if not value.strip():
        raise K2Error(f"/set {name} needs a value", f"/set {name} default")
    chat.settings = changed(chat.settings, name, value.strip())
    chat.terminal.note(f"{name}: {value.strip()}")


@command("/regen", "", "/retry")
def regenerate(chat: Chat, argument: str) -> None:
    """Answer the last question again."""
    chat.regenerate()


@command("/undo")
def undo(chat: Chat, argument: str) -> None:
    """Remove the last question and its answer."""
    question = chat.session.undo()
    if question is None:
        raise K2Error("there is nothing to undo")
    chat.save()
    chat.terminal.note(f"removed: {question.splitlines()[0][:60] if question else ''}")
    chat.terminal.note("/edit changes the question and sends it again")


@command("/edit", "[TEXT]")
def edit(chat: Chat, argument: str) -> None:
    """Write a message in $EDITOR; it begins with the one that was not answered, if any."""
    before = argument or chat.session.unsent or ""
    text = chat.terminal.edit(before).strip()
    if not text:
        chat.terminal.note("empty, so nothing was sent")
        return
    chat.terminal.show_question(text)
    chat.send(text)


@command("/read", "FILE...")
def read(chat: Chat, argument: str) -> None:
    """Quote files in the next message."""
    names = split_names(argument)
    if not names:
        raise K2Error("/read needs a file", "/read notes.md")
    for name in names:
        attachment = read_attachment(name)
        chat.attachments.append(attachment)
        chat.terminal.note(f"{attachment.description}, {_tokens_of(chat, attachment.text)}")
    chat.terminal.note("they go with your next message")


def _tokens_of(chat: Chat, text: str) -> TokenCount:
    if chat.session.model.is_k2:
        try:
            return TokenCount(len(chat.session.api.tokenize(text)), exact=True)
        except K2Error:
            pass  # the message itself is counted before it is sent
    return TokenCount(estimate_tokens(text), exact=False)


@command("/save", "[NAME|FILE.md]")
def save(chat: Chat, argument: str) -> None:
    """Name the conversation, or write it to a file as Markdown or JSON."""
    current = chat.snapshot()
    if current is None:
        raise K2Error("there is no conversation to save")
    path = expand_home(argument)
    if path.suffix in (".md", ".json") or "/" in argument:
        data = encode_json(current) if path.suffix == ".json" else as_markdown(current)
        _write_new(path, data)
        chat.terminal.note(f"wrote {path}")
        return
    if argument and argument != current.name:
        chat.store.rename(current, argument)
        chat.conversation = current
    else:
        chat.save(even_private=True)
    chat.terminal.note(
        f"saved as '{chat.conversation.name if chat.conversation else current.name}'"
    )


def _write_new(path: Path, data: bytes | str) -> None:
    if "\0" in str(path):
        raise K2Error(f"'{path}' cannot be the name of a file", "/save another name")
    if path.exists():
        raise K2Error(f"'{path}' exists already", "/save another name")
    try:
        write_atomically(path, data, mode=0o600)
    except OSError as error:
        raise unwritable(error, path) from error


@command("/load", "NAME")
def load(chat: Chat, argument: str) -> None:
    """Go on with a saved conversation; the beginning of its name is enough."""
    if not argument:
        raise K2Error("/load needs a name", "/sessions lists them")
    chat.save()
    chat.resume(argument)


@command("/sessions", "[TEXT]")
def sessions(chat: Chat, argument: str) -> None:
    """List saved conversations, or those that contain a text."""
    found = list(chat.store.search(argument))
    if not found:
        chat.terminal.note(f"no saved conversation{f' contains {argument!r}' if argument else ''}")
    rows = []
    for each in found:
        changed_at = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.updated))
        rows.append((each.name, f"{changed_at}, {len(each.turns)} messages: {each.title}"))
    chat.terminal.table(rows)
    chat.completer.words["/load"] = chat.store.names()


@command("/copy", "[code]")
def copy(chat: Chat, argument: str) -> None:
    """Copy the last answer, or its last block of code, to the clipboard."""
    text = chat.session.last_answer
    if text is None:
        raise K2Error("there is no answer to copy")
    if argument == "code":
        blocks = _CODE_BLOCK.findall(text)
        if not blocks:
            raise K2Error("the last answer has no block of code", "/copy")
        text = blocks[-1][1]
    elif argument:
        raise K2Error(f"'{argument}' cannot be copied", "/copy, or /copy code")
    how = chat.terminal.copy(text)
    chat.terminal.note(f"copied {format_bytes(len(text.encode()))} {how}")


@command("/compact")
def compact(chat: Chat, argument: str) -> None:
    """Go on with a summary of the conversation, to free the context."""
    session = chat.session
    before = chat.snapshot()
    summary = ""
    parts = parts_to_summarize(session)
    for number, part in enumerate(parts):
        if len(parts) > 1:
            chat.terminal.note(f"summarizing part {number + 1} of {len(parts)}")
        turns = [*(summary_turns(summary) if summary else []), *part]
        text = _summary_of(chat, turns)
        if text is None:
            chat.terminal.note("the conversation is unchanged")
            return
        summary = text
    chat.begin_anew()
    session.turns = summary_turns(summary)
    after = chat.snapshot()
    if before is None or after is None or chat.private:
        return
    after.title, after.continues = before.title, before.name
    after.name = chat.store.free_name(automatic_name(before.title, after.created))
    chat.conversation = after
    chat.save()
    chat.terminal.note(f"the whole conversation stays saved as '{before.name}'")


def _summary_of(chat: Chat, turns: list[dict[str, Any]]) -> str | None:
    """Let the model summarize turns and show it; None if that was stopped or failed."""
    session = chat.session
    first = [{"role": "system", "content": session.system}] if session.system else []
    messages = [*first, *turns, {"role": "user", "content": INSTRUCTION}]
    asked = type(session)(session.api, session.model, chat.settings.options)
    asked.tools = session.tools
    asked.turns = messages[:-1]
    stopped, failure = chat.stream(asked.ask(INSTRUCTION))
    if failure is not None:
        raise failure
    answer = asked.answer
    complete = not stopped and answer is not None and answer.finish_reason == "stop"
    return answer.text if complete and answer is not None and answer.text.strip() else None


@command("/stats", "[on|off]")
def stats(chat: Chat, argument: str) -> None:
    """Show figures of the last answer; on or off: after each answer."""
    if argument:
        chat.settings = changed(chat.settings, "stats", argument)
        chat.terminal.note(f"figures after each answer: {argument}")
        return
    chat.terminal.note(chat.status())
    if chat.session.answer is not None:
        chat.terminal.note(figures_line(chat.session.answer))


@command("/model", "[NAME]")
def model(chat: Chat, argument: str) -> None:
    """List the models of the server, or go on with another one."""
    if argument:
        chat.session.model = chat.session.api.pick_model(argument)
        chat.save()
        chat.terminal.note(f"model: {chat.session.model.name}")
        return
    offered = chat.session.api.models()
    rows = []
    for each in offered:
        here = "* " if each.name == chat.session.model.name else "  "
        length = f"context {each.context_length:,}" if each.context_length else ""
        rows.append((f"{here}{each.name}", length))
    chat.terminal.table(rows)
    chat.completer.words["/model"] = [each.name for each in offered]


@command("/thinking", "[on|off|show|hide]")
def thinking(chat: Chat, argument: str) -> None:
    """Print the reasoning before the last answer; show or hide it; switch it on or off."""
    match argument:
        case "":
            if not (reasoning := chat.session.last_reasoning):
                raise K2Error("there is no reasoning before the last answer")
            chat.terminal.show_reasoning(reasoning)
        case "show" | "hide":
            value = "on" if argument == "show" else "off"
            chat.settings = changed(chat.settings, "show_thinking", value)
            chat.terminal.note(f"reasoning: {'shown' if value == 'on' else 'one line'}")
        case "on" | "off":
            chat.change_options(reasoning_effort="none" if argument == "off" else None)
            chat.terminal.note(f"the model reasons: {argument}, if its template has a switch")
        case _:
            raise K2Error(f"'{argument}' is not known", "/thinking on, off, show or hide")


@command("/exit", "", "/bye", "/quit")
def leave(chat: Chat, argument: str) -> None:
    """Leave (Ctrl-D does too)."""
    chat.leaving = True


def completion_words(chat: Chat) -> dict[str, list[str]]:
    """Return the words that may follow commands."""
    return {
        "/load": chat.store.names(),
        "/model": [chat.session.model.name],
        "/thinking": ["on", "off", "show", "hide"],
        "/stats": ["on", "off"],
        "/copy": ["code"],
        "/system": ["none"],
    }
