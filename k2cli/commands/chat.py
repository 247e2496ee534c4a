"""Command ``k2 chat``: chat with a served model."""

from __future__ import annotations

import math
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from k2cli.commands.target import ApiKeyOption, ModelArgument, UrlOption, resolve_target

if TYPE_CHECKING:
    from k2cli.chat.schema import AnswerSchema
    from k2cli.chat.session import ChatSession


def chat(
    model: ModelArgument = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Ask this and exit; piped input is put before it."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, max=2, help="Sampling temperature; 0 is deterministic. Default: the server's."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed that makes sampling repeatable.")] = None,
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

    Without a prompt the chat is interactive; /help lists its commands. The answer goes to stdout,
    tokens per second and time to first token to stderr. On a terminal, the model's reasoning is
    shown dim before the answer.

    With --schema, answers are JSON that obeys the schema. With -p too, stdout has nothing but the
    JSON, and only if it is whole: an answer that the token limit cuts off ends with exit status 1.

    Example: k2 chat -p 'What is the capital of France?' --temperature 0

    Example: k2 chat -p 'Three cities of France' --schema cities.json | jq .
    """
    from k2cli.chat.session import ChatSession
    from k2cli.client.client import ApiClient, GenerationOptions

    temperature = _checked_temperature(temperature)
    answer_schema = _read_schema(schema, prompt)
    question = _question(prompt, interactive=not as_json, piped=schema != "-")
    target = resolve_target(model, url, api_key)
    options = GenerationOptions(max_tokens, temperature, seed)
    with ApiClient(target.url, target.api_key, target.certificate) as client:
        session = ChatSession(client, client.pick_model(target.model), options, system)
        session.schema = answer_schema
        if question is None:
            _chat_on_terminal(session)
        elif as_json:
            _answer_as_json(session, question)
        elif answer_schema is not None and not sys.stdout.isatty():
            _answer_by_schema(session, question)
        else:
            _answer(session, question)


def _checked_temperature(temperature: float | None) -> float | None:
    """Refuse ``nan``, which the parser accepts as it is neither too small nor too large."""
    from k2cli.errors import UsageError

    if temperature is not None and math.isnan(temperature):
        raise UsageError("--temperature 'nan' is not a number", "k2 chat --temperature 0.7")
    return temperature


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


def _question(prompt: str | None, *, interactive: bool, piped: bool) -> str | None:
    """Join piped input and the argument to one question; None means to chat on the terminal.

    Args:
        interactive: False if a prompt must be given.
        piped: False if stdin is not a part of the question.

    Raises:
        UsageError: if there is no question and no terminal to chat on.
    """
    from k2cli.errors import UsageError

    if sys.stdin.isatty() or not piped:
        if prompt is None and not interactive:
            raise UsageError("--json needs a prompt", "give one with -p, or pipe it in")
        return prompt
    text = sys.stdin.buffer.read().decode(errors="replace").strip()
    question = "\n\n".join(part for part in (text, prompt) if part)
    if not question:
        raise UsageError("there is no prompt", "k2 chat -p 'What is the capital of France?'")
    return question


def _chat_on_terminal(session: ChatSession) -> None:
    from k2cli.chat.interactive import Chat
    from k2cli.settings import state_directory
    from k2cli.ui.chat.terminal import ChatTerminal

    history = state_directory() / "chat-history"
    Chat(session, ChatTerminal(history, markdown=session.schema is None)).run()


def _answer(session: ChatSession, question: str) -> None:
    from k2cli.chat.figures import figures_line, progress_line
    from k2cli.client.answers import Delta, Progress, ReasoningDelta
    from k2cli.ui.chat.stream import AnswerWriter, ReasoningWriter, StatusLine, dim_note

    writer = AnswerWriter(markdown=session.schema is None)
    reasoning, status = ReasoningWriter(), StatusLine()
    try:
        with closing(session.ask(question)) as events:
            for event in events:
                if isinstance(event, Delta):
                    status.clear()
                    reasoning.finish()
                    writer.write(event.text)
                elif isinstance(event, ReasoningDelta):
                    status.clear()
                    reasoning.write(event.text)
                elif isinstance(event, Progress) and (line := progress_line(event)):
                    status.show(line)
    finally:
        status.clear()
        reasoning.finish()
        writer.finish()
    if session.answer is not None:
        dim_note(figures_line(session.answer))


def _answer_by_schema(session: ChatSession, question: str) -> None:
    """Print an answer once it is whole and obeys the schema; meanwhile show its progress."""
    from k2cli.chat.figures import figures_line, progress_line
    from k2cli.client.answers import Progress, ReasoningDelta
    from k2cli.ui.chat.stream import ReasoningWriter, StatusLine, dim_note
    from k2cli.ui.output import print_json

    reasoning, status = ReasoningWriter(), StatusLine()
    try:
        with closing(session.ask(question)) as events:
            for event in events:
                if isinstance(event, ReasoningDelta):
                    status.clear()
                    reasoning.write(event.text)
                elif isinstance(event, Progress) and (line := progress_line(event)):
                    status.show(line)
    finally:
        status.clear()
        reasoning.finish()
    if session.answer is not None:
        # A carriage return in valid JSON is whitespace; print_json would escape it.
        print_json(session.answer.text.strip().replace("\r", " ").encode())
        dim_note(figures_line(session.answer))


def _answer_as_json(session: ChatSession, question: str) -> None:
    from k2cli.chat.figures import answer_document
    from k2cli.chat.session import Answer
    from k2cli.errors import K2Error
    from k2cli.ui.output import print_json

    name, parsed = session.model.name, session.schema is not None
    try:
        with closing(session.ask(question)) as events:
            for _ in events:
                pass
    except K2Error as error:
        # A partial answer is still useful, and the exit status shows that it is incomplete.
        answer = session.answer or Answer()
        print_json(answer_document(name, answer, error.message, parsed=parsed))
        raise
    print_json(answer_document(name, session.answer or Answer(), parsed=parsed))
