"""Rendering of a checkpoint's chat template, in a sandbox because it is untrusted code.

The environment has what templates for Hugging Face's library expect: its whitespace rules, loop
controls, ``raise_exception``, ``strftime_now``, a ``tojson`` without HTML escapes, and the
``generation`` tag, which marks the assistant's text for training and renders its body.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.models.json_files import read_json_object, shown

_MAX_TEMPLATE_BYTES = 2_000_000
MAX_PROMPT_LETTERS = 2**27
"""The longest text that a template may write: four times the largest request body."""


class Oversized(Exception):
    """The template writes more than it may: the cause of the error to show."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: the jinja text.
        special: texts of special tokens by names such as ``bos_token``, for use in templates.

    Raises:
        K2Error: if the template is not valid.
    """

    def __init__(self, source: str, special: dict[str, str]) -> None:
        self.source = source
        self._special = special
        environment = _environment()
        try:
            tree = environment.parse(source)
            self.variables = _undeclared_variables(tree, environment)
            """The names of variables that it reads from outside."""
            self.members = frozenset(
                [node.attr for node in tree.find_all(jinja2.nodes.Getattr)]
                + [node.value for node in tree.find_all(jinja2.nodes.Const) if _is_text(node)]
            )
            """The names of members that it reads, and its other texts."""
            self._template = environment.from_string(tree)
        except Exception as error:  # the compiler of jinja, or that of Python, may raise anything
            raise K2Error(f"the model's chat template is not valid: {error}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        arguments: dict[str, Any],
        max_letters: int = MAX_PROMPT_LETTERS,
    ) -> str:
        """Render the prompt as text.

        Raises:
            K2Error: if the template rejects the messages or fails, or writes too long a text.
        """
        context = {
            **self._special,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **arguments,
        }
        pieces: list[str] = []
        left = max_letters
        try:
            for piece in self._template.generate(context):
                pieces.append(piece)
                if (left := left - len(piece)) < 0:
                    raise Oversized
            return "".join(pieces)
        except (Oversized, MemoryError) as error:
            text = f"the model's chat template writes more than {max_letters} letters"
            if isinstance(error, MemoryError):
                text = "the model's chat template takes more memory than there is"
            raise K2Error(text) from Oversized()
        except jinja2.TemplateError as error:
            raise K2Error(f"the model's chat template refuses: {error}") from error
        except Exception as error:  # template code may raise anything on unexpected messages
            reason = f"{type(error).__name__}: {error}"
            raise K2Error(f"the model's chat template failed on the messages: {reason}") from error


def _undeclared_variables(
    tree: jinja2.nodes.Template, environment: jinja2.Environment
) -> frozenset[str]:
    """Do what ``jinja2.meta`` does, which would compute constant expressions."""
    generator = jinja2.meta.TrackingCodeGenerator(environment)
    generator.optimizer = None
    generator.visit(tree)
    return frozenset(generator.undeclared_identifiers)


def _is_text(node: jinja2.nodes.Const) -> bool:
    return isinstance(node.value, str)


@dataclass(frozen=True, slots=True)
class TemplateSources:
    """The texts of a model's templates, read once, and their files; None if it has none.

    ``with_tools`` is for requests that offer tools; it is usually the same text. ``others`` are the
    names of templates for other purposes, if none is the default.
    """

    path: str
    plain: str | None
    tools_path: str
    with_tools: str | None
    others: str = ""


def read_chat_templates(folder: Path, tokenizer_config: dict[str, Any]) -> TemplateSources:
    """Read ``chat_template.jinja``, ``chat_template.json`` or the tokenizer config's entry.

    If there are several by name, in a list or in ``additional_chat_templates/``, requests with
    tools prefer the one named ``tool_use``.

    Raises:
        K2Error: if a file cannot be read or is malformed.
    """
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        for_tools = folder / "additional_chat_templates" / "tool_use.jinja"
        tools_path = for_tools if os.path.lexists(for_tools) else path
        return TemplateSources(str(path), _read_text(path), str(tools_path), _read_text(tools_path))
    path = folder / "chat_template.json"
    if os.path.lexists(path):
        entry = read_json_object(path).get("chat_template")
    else:
        path = folder / "tokenizer_config.json"
        entry = tokenizer_config.get("chat_template")
    if isinstance(entry, dict):
        entry = [{"name": name, "template": text} for name, text in entry.items()]
    if not isinstance(entry, list):
        entry = [{"name": "default", "template": entry}]
    named = {
        each["name"]: each.get("template")
        for each in entry
        if isinstance(each, dict) and isinstance(each.get("name"), str)
    }
    plain = named.get("default")
    with_tools = named.get("tool_use", plain)
    if not all(text is None or isinstance(text, str) for text in (plain, with_tools)):
        raise K2Error(f"{path}: chat_template must be a text or a list of named texts")
    others = "" if "default" in named else ", ".join(map(shown, named))
    return TemplateSources(str(path), plain, str(path), with_tools, others)


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, _MAX_TEMPLATE_BYTES, follow_links=True).decode()
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise K2Error(f"{path} is not UTF-8: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        # Without these two, constant expressions are computed by the compiler: 9 ** 9 ** 9.
        optimized=False,
        finalize=_when_rendered,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment


@jinja2.pass_context
def _when_rendered(context: jinja2.runtime.Context, value: Any) -> Any:
    """Return the value; because the context is needed, that is not done when compiling."""
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes <, > and & for HTML, and the model would see the escapes.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
