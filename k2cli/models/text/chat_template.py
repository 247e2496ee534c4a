"""Rendering of a checkpoint's chat template, in a sandbox because it is untrusted code.

The environment has what templates for Hugging Face's library expect: its whitespace rules, loop
controls, ``raise_exception``, ``strftime_now``, a ``tojson`` without HTML escapes, and the
``generation`` tag, which marks the assistant's text for training and renders its body.
"""

from __future__ import annotations

import datetime
import json
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
from k2cli.models.checkpoint import read_json_object

_MAX_TEMPLATE_BYTES = 2_000_000


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
        except Exception as error:  # the compiler raises more than its own errors
            raise K2Error(f"the model's chat template is not valid: {error}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        arguments: dict[str, Any],
    ) -> str:
        """Render the prompt as text.

        Raises:
            K2Error: if the template rejects the messages or fails.
        """
        context = {
            **self._special,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **arguments,
        }
        try:
            return self._template.render(context)
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


def read_chat_template(
    folder: Path, tokenizer_config: dict[str, Any], *, with_tools: bool = False
) -> str | None:
    """Read the template: ``chat_template.jinja``, ``.json`` or the tokenizer config's entry.

    If the entry is a list, ``with_tools`` prefers the template named ``tool_use``.

    Raises:
        K2Error: if a file cannot be read or is malformed.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise K2Error(f"{path} is larger than {_MAX_TEMPLATE_BYTES} bytes")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise K2Error(f"{path} is not UTF-8: {error}") from error
    entry = tokenizer_config.get("chat_template")
    path = folder / "chat_template.json"
    if path.is_file():
        entry = read_json_object(path).get("chat_template")
    if isinstance(entry, list):
        entry = _choose(entry, with_tools)
    if entry is not None and not isinstance(entry, str):
        raise K2Error(f"{folder}: chat_template must be a text or a list of named texts")
    return entry


def _choose(entries: list[Any], with_tools: bool) -> Any:
    named = {
        entry["name"]: entry.get("template")
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    if with_tools and "tool_use" in named:
        return named["tool_use"]
    return named.get("default")


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
