"""Command ``k2 chat``: chat with a served model."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from k2cli.commands import options
from k2cli.commands.target import ApiKeyOption, ModelArgument, UrlOption

if TYPE_CHECKING:
    from k2cli.chat.attachments import Attachment
    from k2cli.chat.conversations import Conversation, ConversationStore
    from k2cli.chat.schema import AnswerSchema
    from k2cli.chat.session import ChatSession
    from k2cli.chat.settings import ChatSettings
    from k2cli.chat.tools import ToolBox
    from k2cli.commands.chat.run import ChatRuns
    from k2cli.commands.target import Target


def chat(
    model: ModelArgument = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Ask this and exit; piped input is put before it."),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", metavar="PATH", help="Quote a file in the first message."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, max=2, help="Sampling temperature; 0 is deterministic. Default: the server's."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed that makes sampling repeatable.")] = None,
    no_thinking: Annotated[
        bool, typer.Option("--no-thinking", help="Ask the model not to reason, if it can.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME]",
            help="Go on with a saved conversation; without NAME, or with last: the newest.",
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="Keep neither the conversation nor what is entered, nor its caches on a disk.",
        ),
    ] = False,
    tools: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Switch on an MCP server of mcp.json, so that the model may call its tools. "
            "Repeatable.",
        ),
    ] = None,
    allow_tool: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SERVER__TOOL",
            help="With --tools: tool that is called without a question. Repeatable.",
        ),
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="JSON schema that answers obey; - reads it from stdin, with -p."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print answer and statistics as one JSON document.")
    ] = False,
) -> None:
    """Chat with a model served by k2 launch or by another server.

    If no run is live, k2 chat MODEL starts one on this machine, which ends with its last chat.
    The model demo is downloaded for it; others have to be on this machine.

    Without a prompt the chat is interactive; /help lists its commands. The answer goes to stdout,
    tokens per second and time to first token to stderr. On a terminal, Markdown is rendered, and
    one line shows what the server does before the answer. Conversations are saved.

    With --schema, answers are JSON that obeys the schema. With -p too, stdout has nothing but the
    JSON, and only if it is whole: an answer that the token limit cuts off ends with exit status 1.

    Example: k2 chat demo

    Example: k2 chat -p 'What is the capital of France?' --temperature 0

    Example: git diff | k2 chat -p 'Review this' --file CONTRIBUTING.md

    Example: k2 chat -p 'Three cities of France' --schema cities.json | jq .
    """
    from k2cli.chat.attachments import read_attachment
    from k2cli.chat.session import ChatSession
    from k2cli.client.client import ApiClient
    from k2cli.commands.chat.once import OneShot
    from k2cli.commands.chat.run import ChatRuns
    from k2cli.errors import UsageError
    from k2cli.units import one_line

    if allow_tool and not tools:
        hint = f"--tools {allow_tool[0].partition('__')[0]} --allow-tool {allow_tool[0]}"
        raise UsageError("--allow-tool is for --tools", hint)
    if model is not None and " " in model.strip() and prompt is None and not os.path.exists(model):
        shown = shlex.quote(one_line(model))
        raise UsageError(f"{shown} is no name of a model", f"k2 chat -p {shown}")
    temperature = _checked_temperature(temperature)
    answer_schema = _read_schema(schema, prompt)
    attachments = [read_attachment(name) for name in file or []]
    question = _question(prompt, attachments, interactive=not as_json, piped=schema != "-")
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    settings = _settings({**given, "reasoning_effort": "none" if no_thinking else None}, system)
    _check_names(tools or [], resume)
    with ExitStack() as stack:
        runs = stack.enter_context(closing(ChatRuns()))
        target = runs.find(model, url, api_key)
        client = stack.enter_context(ApiClient(target.url, target.api_key, target.certificate))
        picked = client.pick_model(target.model)
        session = ChatSession(client, picked, settings.options, settings.system, answer_schema)
        session.private = private
        box = stack.enter_context(closing(_tool_box(allow_tool or [])))
        if question is None:
            _chat_on_terminal(
                session,
                settings,
                (runs, target),
                box,
                tools or [],
                resume,
                attachments,
                private=private,
            )
            return
        one_shot = OneShot(session, box)
        one_shot.turn_on(tools or [])
        resumed = _resumed(session, resume)
        if file:
            _check_room(session, question)
        if as_json:
            one_shot.answer_as_json(question)
        elif answer_schema is not None and not sys.stdout.isatty():
            one_shot.answer_by_schema(question)
        else:
            one_shot.answer(question)
        _save_resumed(session, resumed)


def _checked_temperature(temperature: float | None) -> float | None:
    """Refuse ``nan``, which the parser accepts as it is neither too small nor too large."""
    from k2cli.errors import UsageError

    if temperature is not None and math.isnan(temperature):
        raise UsageError("--temperature 'nan' is not a number", "k2 chat --temperature 0.7")
    return temperature


def _settings(options: dict[str, Any], system: str | None) -> ChatSettings:
    """Read the file of defaults, and put the options of the command line over it."""
    from dataclasses import replace

    from k2cli.chat.settings import FILE_NAME, read_settings
    from k2cli.settings import config_directory

    settings = read_settings(config_directory() / FILE_NAME)
    given = {name: value for name, value in options.items() if value is not None}
    settings = replace(settings, options=replace(settings.options, **given))
    return settings if system is None else replace(settings, system=system)


def _read_schema(name: str | None, prompt: str | None) -> AnswerSchema | None:
    from k2cli.chat.schema import STDIN, read_schema
    from k2cli.errors import UsageError

    if name is None:
        return None
    if name == STDIN and prompt is None:
        raise UsageError(
            "--schema - needs a prompt, since stdin is taken by the schema",
            "k2 chat -p 'Three cities of France' --schema - < cities.json",
        )
    return read_schema(name)


def _question(
    prompt: str | None, attachments: list[Attachment], *, interactive: bool, piped: bool
) -> str | None:
    """Join files, piped input and the argument to one question; None means an interactive chat.

    Args:
        interactive: False if a prompt must be given.
        piped: False if stdin is not a part of the question.

    Raises:
        UsageError: if there is no question and no terminal to chat on.
    """
    from k2cli.chat.attachments import with_attachments
    from k2cli.errors import UsageError

    text = None
    if sys.stdin.isatty() or not piped:
        if prompt is None and not interactive:
            raise UsageError("--json needs a prompt", "give one with -p, or pipe it in")
        if prompt is None:
            return None
    else:
        text = sys.stdin.buffer.read().decode(errors="replace").strip()
    question = "\n\n".join(part for part in (text, prompt) if part)
    if not question:
        raise UsageError("there is no prompt", "k2 chat -p 'What is the capital of France?'")
    return with_attachments(question, attachments)


def _chat_on_terminal(
    session: ChatSession,
    settings: ChatSettings,
    place: tuple[ChatRuns, Target],
    box: ToolBox,
    tools: list[str],
    resume: str | None,
    attachments: list[Attachment],
    *,
    private: bool,
) -> None:
    from k2cli.chat.commands import COMMANDS, completion_words
    from k2cli.chat.interactive import Chat
    from k2cli.chat.tool_commands import TOOL_COMMANDS, complete_names
    from k2cli.errors import K2Error, UsageError
    from k2cli.settings import state_directory
    from k2cli.ui.chat.terminal import ChatTerminal

    runs, target = place
    history = None if private else state_directory() / "chat-history"
    terminal = ChatTerminal(history, markdown=session.schema is None)
    nodes = [] if target.run is None else [rank.node for rank in target.run.ranks]
    chat = Chat(
        session,
        terminal,
        settings,
        _store(),
        {**COMMANDS, **TOOL_COMMANDS},
        tools=box,
        private=private,
        place=", ".join(dict.fromkeys(nodes)),
        reconnect=None if target.run is None else lambda session: _reconnect(session, runs),
    )
    chat.attachments = attachments
    if resume is not None:
        chat.resume(_resolved(resume))
    chat.completer.words = completion_words(chat)
    if tools:
        try:
            chat.turn_on(tools)
        except UsageError:
            raise
        except K2Error as error:  # the chat can do without them
            terminal.error(error)
        else:
            box.check_allowed_names()
        complete_names(chat)
    chat.run()


def _check_names(tools: list[str], resume: str | None) -> None:
    """Check that servers and the conversation exist, before a model is loaded for the chat.

    Raises:
        K2Error: if one does not, or its file cannot be used.
    """
    if tools:
        with closing(_tool_box([])) as box:
            file = box.read_file()
            for name in tools:
                file.server(name)
    if resume is not None:
        _store().load(_resolved(resume))


def _tool_box(allowed: list[str]) -> ToolBox:
    from k2cli.chat.tools import ToolBox
    from k2cli.settings import config_directory

    return ToolBox(config_directory() / "mcp.json", allowed)


def _reconnect(session: ChatSession, runs: ChatRuns) -> None:
    """Move a session to the live run that serves its model now, if there is another one."""
    from contextlib import suppress

    from k2cli.client.client import ApiClient
    from k2cli.errors import K2Error

    with suppress(K2Error):
        target = runs.again(session.model.name)
        client = ApiClient(target.url, target.api_key, target.certificate)
        if client.base == session.api.base:
            client.close()
            return
        session.model = client.pick_model(target.model)
        session.api.close()
        session.api = client


def _store() -> ConversationStore:
    from k2cli.chat.conversations import ConversationStore
    from k2cli.settings import state_directory

    return ConversationStore(state_directory() / "chats")


def _resolved(resume: str) -> str:
    return _store().newest() if resume == "last" else resume


def _resumed(
    session: ChatSession, resume: str | None
) -> tuple[ConversationStore, Conversation] | None:
    """Load the conversation that a one-shot question goes on with."""
    from k2cli.chat.interactive import restore

    if resume is None:
        return None
    store = _store()
    loaded = store.load(_resolved(resume))
    restore(session, loaded)
    return store, loaded


def _save_resumed(
    session: ChatSession, resumed: tuple[ConversationStore, Conversation] | None
) -> None:
    from k2cli.chat.conversations import turns_of

    if resumed is not None:
        store, loaded = resumed
        loaded.turns = turns_of(session.turns)
        loaded.updated = time.time()
        store.save(loaded)


def _check_room(session: ChatSession, question: str) -> None:
    """Say how many tokens the prompt has, or refuse it if these are too many."""
    from k2cli.chat.budget import check_room
    from k2cli.ui.chat.stream import dim_note

    hint = "a shorter question or file; or a run with a longer --context"
    counted, length = check_room(session, question, hint), session.model.context_length
    dim_note(f"prompt: {counted}" + (f" of {length:,}" if length else ""))
