"""Interactive chat: reads messages, executes ``/commands``, streams answers, saves conversations.

Ctrl-C during an answer stops it, also on the server, and keeps the partial answer; at the prompt
it prints how to leave. A failure of the server ends the answer but not the chat: the message is
kept, and the next one tries again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from k2cli.chat.attachments import (
    Attachment,
    mentioned_files,
    missing_files,
    read_attachment,
    with_attachments,
)
from k2cli.chat.budget import check_room, context_share, context_warning, is_large
from k2cli.chat.completion import Completer
from k2cli.chat.conversations import (
    Conversation,
    ConversationStore,
    api_turns,
    automatic_name,
    title_of,
    turns_of,
)
from k2cli.chat.figures import figures_line
from k2cli.chat.interrupts import noted_interrupts, one_interrupt
from k2cli.chat.tool_turns import answer_calls, described_call, is_cut, rounds
from k2cli.chat.tools import cannot_call
from k2cli.chat.waiting import Waiting
from k2cli.client.answers import Delta, ReasoningDelta, StreamEvent
from k2cli.errors import ClusterError, K2Error
from k2cli.units import one_line

if TYPE_CHECKING:
    from k2cli.chat.calls import ToolCall
    from k2cli.chat.commands import Command
    from k2cli.chat.session import ChatSession
    from k2cli.chat.settings import ChatSettings
    from k2cli.chat.terminal import AnswerScreen, Terminal
    from k2cli.chat.tools import ToolBox

_COMMAND = re.compile(r"(/[a-z?]+)(?:\s+(.*))?", re.DOTALL)


class Chat:
    """One interactive chat; ``run`` returns when the user leaves.

    Args:
        session: the conversation with its server.
        terminal: what reads from the user and shows answers.
        settings: what ``/set`` changes.
        store: the saved conversations.
        commands: the commands by name.
        tools: those that the model may call.
        private: True to save nothing unless the user asks for it.
        place: names the nodes of the run; "" if they are not known.
        reconnect: moves the session to the live run after a failure, if there is one.
    """

    def __init__(
        self,
        session: ChatSession,
        terminal: Terminal,
        settings: ChatSettings,
        store: ConversationStore,
        commands: dict[str, Command],
        *,
        tools: ToolBox,
        private: bool = False,
        place: str = "",
        reconnect: Callable[[ChatSession], None] | None = None,
    ) -> None:
        self.session = session
        self.terminal = terminal
        self.settings = settings
        self.store = store
        self.commands = commands
        self.tools = tools
        self.private = private
        self.leaving = False
        self.attachments: list[Attachment] = []
        self.conversation: Conversation | None = None
        self.completer = Completer({each.name: each.meaning for each in commands.values()})
        self._place = place
        self._reconnect = reconnect
        self._server_failed = False
        self._save_failed = False
        self._warned_at = 0.0

    def run(self) -> None:
        """Chat until the user leaves."""
        kept = "; nothing is saved" if self.private else ""
        name = self.session.model.name
        self.terminal.note(
            f"{name}: /help for commands, Ctrl-C stops an answer, Ctrl-D leaves{kept}"
        )
        while not self.leaving:
            try:
                text = self.terminal.read_message(self.status(), self.completer)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.terminal.note("Ctrl-D or /exit to leave")
                continue
            try:
                self._handle(text)
            except K2Error as error:
                self.terminal.error(error)
            except KeyboardInterrupt:
                self.terminal.note("stopped")

    def _handle(self, text: str) -> None:
        """Execute a command, or send a message."""
        match = _COMMAND.fullmatch(text.rstrip())
        if match is None:
            if text.strip() or self.attachments:
                self.send(text.strip())
            return
        name, argument = match.group(1), (match.group(2) or "").strip()
        command = self.commands.get(name)
        if command is None:
            hint = "/help lists them; with a space before it, it is sent as a message"
            raise K2Error(f"there is no command '{name}'", hint)
        command.run(self, argument)

    # --- messages -----------------------------------------------------------------------------

    def send(self, text: str) -> None:
        """Send a message with the files that it names, and show the answer.

        Raises:
            K2Error: if a file cannot be read, or the context has no room.
        """
        for name in missing_files(text):
            self.terminal.note(f"'{name}' is no file here: it is sent as text")
        files = [*self.attachments, *(read_attachment(name) for name in mentioned_files(text))]
        question = with_attachments(text, files)
        self._prepare()
        if files or is_large(self.session, question):
            counted = check_room(self.session, question)
            length = self.session.model.context_length
            room = f" of {length:,}" if length else ""
            names = "".join(f"{each.description}, " for each in files)
            self.terminal.figures(f"{names}prompt: {counted}{room}")
        self.attachments = []
        self.show(self.session.ask(question))

    def regenerate(self) -> None:
        """Answer the last question again.

        Raises:
            K2Error: if there is none.
        """
        self._prepare()
        self.show(self.session.regenerate())

    def _prepare(self) -> None:
        self.session.options = self.settings.options
        self.session.tools = self.tools.definitions()
        if self._server_failed and self._reconnect is not None:
            self._reconnect(self.session)

    def show(self, events: Generator[StreamEvent]) -> None:
        """Stream an answer to the terminal, make its calls of tools, and save the conversation."""
        stopped, failure = False, None
        for answer in rounds(self.session, events, self._answer_calls, self.terminal.note):
            stopped, failure = self.stream(answer)
            if stopped or failure is not None:
                break
        if failure is not None:
            self.terminal.error(failure)
        elif stopped:
            self.terminal.note("stopped")
        elif self.settings.stats and self.session.answer is not None:
            self.terminal.figures(figures_line(self.session.answer))
        self._server_failed = isinstance(failure, ClusterError)
        if self.session.unsent is not None:
            self.terminal.note("your message is kept: /regen sends it again, /edit changes it")
        self._warn_once()
        self.save()

    def _answer_calls(self) -> bool:
        """Make the calls of the last answer; False if the user stopped that."""
        finished = answer_calls(
            self.session, self.tools, self.terminal, self._may_call, command="/result"
        )
        if finished:
            self.save()
        else:
            self.terminal.note("stopped")
        return finished

    def _may_call(self, call: ToolCall) -> bool:
        """Ask the user if a call may be made."""
        answers = {"y": "once", "a": "always in this conversation", "n": "no"}
        if is_cut(call):
            answers["s"] = "show all arguments"
        while True:
            try:
                answer = self.terminal.choose(f"call {one_line(call.name)}?", answers)
            except EOFError:
                return False
            if answer == "s":
                self.terminal.call(described_call(call, whole=True))
                continue
            if answer == "a":
                self.tools.allow(call.name)
            return answer != "n"

    def turn_on(self, names: Sequence[str]) -> None:
        """Switch servers or tools on, and say what there is.

        Raises:
            K2Error: if that is not possible.
            KeyboardInterrupt: if the user stops it.
        """
        with noted_interrupts() as noted, self.terminal.working(lambda: "starting the tools"):
            notes = self.tools.turn_on(names, lambda: noted.came)
        for note in notes:
            self.terminal.note(note)
        if self.session.model.tools is False:
            self.terminal.warn(cannot_call(self.session.model))

    def stream(self, events: Generator[StreamEvent]) -> tuple[bool, K2Error | None]:
        """Show an answer as it arrives; return if the user stopped it, and why it failed."""
        with one_interrupt():
            return self._stream(events)

    def _stream(self, events: Generator[StreamEvent]) -> tuple[bool, K2Error | None]:
        waiting = Waiting()
        screen: AnswerScreen | None = None
        try:
            # Closing the generator tells the server to stop.
            with closing(events) as stream:
                screen = self.terminal.answer_screen(
                    waiting.status, waiting.thought, show_reasoning=self.settings.show_thinking
                )
                for event in stream:
                    waiting.update(event)
                    if isinstance(event, Delta):
                        screen.answer_text(event.text)
                    elif isinstance(event, ReasoningDelta):
                        screen.reasoning_text(event.text)
        except KeyboardInterrupt:
            return True, None
        except K2Error as error:
            return False, error
        finally:
            if screen is not None:
                screen.end()
        return False, None

    def _warn_once(self) -> None:
        """Warn when the context is nearly full, and again at each further 5 %."""
        share = context_share(self.session) or 0.0
        warning = context_warning(self.session)
        if warning is not None and share >= self._warned_at + 0.05:
            self._warned_at = share
            self.terminal.warn(warning)
        elif warning is None:
            self._warned_at = 0.0

    def status(self) -> str:
        """Describe model, nodes and context in one line."""
        session = self.session
        parts = [session.model.name, *([self._place] if self._place else [])]
        used, length = session.context_tokens, session.model.context_length
        if length:
            share = f" ({used / length:.0%})" if used else ""
            # What was resumed, or is left after /undo, is counted with the next answer.
            counted = f"{used or 0:,} " if used is not None or not session.turns else ""
            parts.append(f"context {counted}of {length:,}{share}")
        if session.answer is not None and (share_cached := cache_share(session)) is not None:
            parts.append(f"{share_cached:.0%} from the cache")
        if self.attachments:
            parts.append(f"with {', '.join(each.name for each in self.attachments)}")
        if self.tools.servers:
            parts.append(f"tools: {', '.join(self.tools.servers)}")
        if self.private:
            parts.append("private")
        return " · ".join(parts)

    # --- conversations ------------------------------------------------------------------------

    def save(self, *, even_private: bool = False) -> None:
        """Save the conversation, unless the chat is private; a full disk does not end a chat."""
        if self.private and not even_private:
            return
        current = self.snapshot()
        if current is None:
            return
        name = current.name
        try:
            self.store.save(current)
        except K2Error as error:
            if not self._save_failed or even_private:
                self.terminal.error(error)
            self._save_failed = True
            return
        self._save_failed = False
        if self.conversation is not None and current.name != name:
            self.terminal.note(f"another chat changed '{name}': this one is '{current.name}' now")
        self.conversation = current

    def snapshot(self) -> Conversation | None:
        """Return the conversation as it would be saved; None if nothing was said."""
        session, before = self.session, self.conversation
        if not session.turns and session.unsent is None and before is None:
            return None
        now = time.time()
        first = next((turn["content"] for turn in session.turns), session.unsent or "")
        title = before.title if before is not None else title_of(first)
        return Conversation(
            name=before.name if before is not None else automatic_name(title, now),
            title=title,
            model=session.model.name,
            created=before.created if before is not None else now,
            updated=now,
            turns=turns_of(session.turns),
            system=session.system,
            unsent=session.unsent,
            continues=before.continues if before is not None else None,
        )

    def resume(self, name: str) -> None:
        """Go on with a saved conversation.

        Raises:
            K2Error: if there is none of that name.
        """
        loaded = self.store.load(name)
        self.conversation = loaded
        self.tools.forget_allowed()
        restore(self.session, loaded)
        count = len(loaded.turns)
        self.terminal.note(f"{loaded.name}: {loaded.title} ({count} messages)")
        said = [turn for turn in loaded.turns if turn.role != "tool" and turn.content]
        for turn in said[-2:]:
            if turn.role == "assistant":
                self.terminal.show_answer(turn.content)
            else:
                self.terminal.show_question(turn.content)

    def begin_anew(self) -> None:
        """Leave the conversation, which stays saved, and begin a new one."""
        self.save()
        self.session.clear()
        self.tools.forget_allowed()
        self.conversation = None
        self.attachments = []
        self._warned_at = 0.0

    def change_options(self, **values: object) -> None:
        """Change options that the server gets."""
        options = replace(self.settings.options, **values)  # type: ignore[arg-type]
        self.settings = replace(self.settings, options=options)


def restore(session: ChatSession, saved: Conversation) -> None:
    """Put the turns of a saved conversation into a session."""
    session.clear()
    session.turns = api_turns(saved.turns)
    session.unsent = saved.unsent
    session.system = saved.system if saved.system is not None else session.system


def cache_share(session: ChatSession) -> float | None:
    """Return the share of the last prompt that came from the cache; None if it is not known."""
    usage = session.answer.usage if session.answer else {}
    details, prompt = usage.get("prompt_tokens_details"), usage.get("prompt_tokens")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    if not isinstance(cached, int) or not isinstance(prompt, int) or not prompt:
        return None
    return cached / prompt
