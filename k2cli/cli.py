"""Typer application, and ``main``: the one place where an error becomes an exit code.

Each command is a function of the same name in a module of ``k2cli.commands``. Those modules import
nothing heavy at their top, so that help and usage errors appear at once.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from k2cli import __version__
from k2cli.errors import EXIT_INTERRUPTED, InternalError, K2Error, UsageError
from k2cli.system.file_limit import raise_file_limit

_PARSER_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""The parser's ``UsageError``, which typer does not export."""

_COMMANDS = (
    ("download", "download"),
    ("plan-memory", "plan_memory"),
    ("quantize", "quantize"),
    ("doctor", "doctor"),
    ("launch", "launch"),
    ("ps", "ps"),
    ("top", "top"),
    ("logs", "logs"),
    ("stop", "stop"),
    ("chat", "chat.command"),
    ("connect", "connect"),
    ("bench", "bench"),
)
_GROUPS = ("cluster", "models", "keys", "cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        from k2cli.ui.output import print_text

        print_text(f"k2 {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Run trillion-parameter open models on a few Apple Silicon machines."""


def build_app(only: str | None = None) -> typer.Typer:
    """Build the application with all commands, or with ``only`` one because building is slow."""
    app = typer.Typer(
        name="k2",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=(
            "Exit codes: 0 ok, 1 failed, 2 usage, 3 does not fit in memory, 4 not authorised, "
            "5 a node or rank failed, 70 bug in k2, 130 interrupted."
        ),
    )
    app.callback()(_root)
    for name, module_name in _COMMANDS:
        if only not in (None, name):
            continue
        module = importlib.import_module(f"k2cli.commands.{module_name}")
        command = getattr(module, name.replace("-", "_"))
        # Given in full, because typer would cut off a long line in the list of commands.
        app.command(name, short_help=_first_paragraph(command))(command)
    for name in _GROUPS:
        if only not in (None, name):
            continue
        module = importlib.import_module(f"k2cli.commands.{name}.group")
        app.add_typer(getattr(module, name), name=name)
    return app


def _only(words: Sequence[str]) -> str | None:
    """Return the command that a line begins with; None if all commands must be built."""
    name = words[0] if words else None
    return name if name in {*dict(_COMMANDS), *_GROUPS} else None


def _command_of(words: Sequence[str]) -> str:
    """Return the command of a line, such as ``k2 cache list``, as far as there is one."""
    only = _only(words)
    names = [only] if only is not None else []
    if only in _GROUPS and len(words) > 1 and not words[1].startswith("-"):
        names.append(words[1])
    return " ".join(["k2", *names])


_RESUME, _NEWEST = "--resume", "last"
_CHAT_SWITCHES = frozenset({"--no-thinking", "--private", "--json"})


def _with_resume_name(words: Sequence[str]) -> Sequence[str]:
    """Add ``last`` to a ``--resume`` without a name: the parser has no optional values."""
    if not words or words[0] != "chat":
        return words
    whole: list[str] = []
    for number, word in enumerate(words):
        whole.append(word)
        if word == "--":
            return [*whole, *words[number + 1 :]]
        before, after = words[number - 1], words[number + 1 : number + 2]
        is_value = before.startswith("-") and "=" not in before and before not in _CHAT_SWITCHES
        if word == _RESUME and not is_value and (not after or after[0].startswith("-")):
            whole.append(_NEWEST)
    return whole


def _check_encoding(words: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8, unless they name a file that exists.

    Python passes such bytes on as lone surrogates, which no request and no JSON document can hold.

    Raises:
        UsageError: if one is neither; the message never shows a key.
    """
    for before, word in zip(("", *words), words, strict=False):
        try:
            word.encode()
        except UnicodeEncodeError:
            if os.path.lexists(word) or os.path.lexists(word.partition("=")[2]):
                continue
            shown = f"'{word.encode(errors='replace').decode()}'"
            if "--api-key" in (before, word.partition("=")[0]):
                shown = "--api-key"
            raise UsageError(
                f"{shown} is not UTF-8", "check the encoding of the terminal: locale"
            ) from None


def _first_paragraph(function: Callable[..., object]) -> str:
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


_FOLDER_ERRORS = (
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
"""Errors of the system that show the state of a folder, and not a bug."""


def _open_closed_streams() -> None:
    """Open the null device in place of closed descriptors 0 to 2.

    Otherwise the next file or socket would take the number, and receive what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    # A terminal of another encoding must not turn a name into an error.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


# mlx 0.32 (metal/device.cpp), from whatever needs memory first.
_NO_METAL = "[metal::load_device] No Metal device"


def _condition_error(error: Exception) -> K2Error | None:
    """Return the error for a folder, a disk or a GPU that cannot be used, None for others."""
    from k2cli.files import DISK_ERRORS, disk_hint, disk_reason

    if str(error).startswith(_NO_METAL):
        return K2Error(
            "macOS gives this session no GPU, and without one MLX does nothing on a Mac; sandboxes "
            "and most virtual machines have none",
            "run the command in Terminal or over ssh, outside of the sandbox",
        )
    if not isinstance(error, OSError):
        return None
    if not error.filename:
        # Files are written by name, so it was the output; tempfile names none of its folders.
        if error.errno in DISK_ERRORS:
            return K2Error(f"the output cannot be written: {error.strerror}")
        if "usable temporary directory" in str(error):
            return K2Error(str(error.strerror), "make room there, or set TMPDIR to another folder")
        return None
    if error.errno not in DISK_ERRORS and error.errno not in _FOLDER_ERRORS:
        return None
    path = Path(os.fsdecode(error.filename))
    hint = "check HOME, or set K2_CONFIG_DIR, K2_STATE_DIR and K2_DATA_DIR to folders of yours"
    return K2Error(f"'{path}': {disk_reason(error, path)}", disk_hint(error, path) or hint)


def _show(error: K2Error) -> int:
    """Print an error as far as possible, and return its exit code."""
    from k2cli.ui.output import print_error

    try:
        print_error(error)
    except (OSError, ValueError):  # stderr is closed, or a file on a full disk
        _discard(2)
    return error.exit_code


def _discard(number: int) -> None:
    """Send what is still written to a stream to the null device, and its buffer at exit too."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def _is_interrupt(error: BaseException | None) -> bool:
    """True if Ctrl-C caused the error; compiled modules replace it by an error of their own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _report_bug(error: Exception) -> int:
    """Save the traceback to a file, print one line, and return the exit code."""
    from k2cli.settings import debug_enabled, state_directory
    from k2cli.stderr import say_on_stderr

    report = "".join(traceback.format_exception(error))
    if debug_enabled():
        say_on_stderr(report)
    try:
        path = state_directory() / "crash.log"
    except K2Error as no_home:
        return _show(InternalError(f"internal error: {error!r}", no_home.message))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report, encoding="utf-8", errors="backslashreplace")
        where = f"the traceback is in {path}; K2_DEBUG=1 shows it"
    except OSError as failure:
        where = f"K2_DEBUG=1 shows the traceback; {path} cannot be written: {failure.strerror}"
    return _show(InternalError(f"internal error: {type(error).__name__}: {error}", where))


def run_command_line(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's, and return its exit code.

    Raises:
        UsageError: if the command line is wrong.
        BaseException: any error that a command raises.
    """
    words = _with_resume_name(sys.argv[1:] if arguments is None else arguments)
    _check_encoding(words)
    app = build_app(_only(words))
    try:
        # A standalone parser would report wrong values itself, without quoting them.
        code = app(args=list(words), prog_name="k2", standalone_mode=False)
    except _PARSER_ERROR as error:
        from k2cli.commands.usage_errors import usage_error_from

        if type(error).__name__ == "NoArgsIsHelpError":  # ``k2`` alone: its message is the help
            error.show()
            return UsageError.exit_code
        parser = typer.main.get_command(app)
        raise usage_error_from(error, _command_of(words), words, parser) from error
    except typer.Abort as error:
        raise K2Error("the input ended before the question was answered") from error
    return code if isinstance(code, int) else 0


def _whole_hint(hint: str | None, words: Sequence[str]) -> str | None:
    """Return a hint with the whole command line, where it names options of the command."""
    if hint is None or "--" not in hint or (only := _only(words)) is None:
        return hint
    from k2cli.commands.whole_hint import whole_hint

    try:
        return whole_hint(typer.main.get_command(build_app(only)), words, hint)
    except Exception:  # the error itself must be shown
        return hint


def main() -> None:
    """Run the command line and exit."""
    _open_closed_streams()
    raise_file_limit()
    try:
        sys.exit(run_command_line())
    except K2Error as error:
        error.hint = _whole_hint(error.hint, sys.argv[1:])
        sys.exit(_show(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output is gone (``k2 logs | head``): nothing more can be printed.
        _discard(sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if _is_interrupt(error):
            sys.exit(EXIT_INTERRUPTED)
        if (condition := _condition_error(error)) is None:
            sys.exit(_report_bug(error))
        code = _show(condition)
        if isinstance(error, OSError) and not error.filename:
            _discard(1)  # its buffer would be written again at exit
        sys.exit(code)
