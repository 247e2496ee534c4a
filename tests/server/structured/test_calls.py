"""Grammars of calls, compared with our parser, with jsonschema, and with what models write."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

import jsonschema
import pytest

from k2cli.server.errors import ApiError
from k2cli.server.output.known_formats import TOOL_FORMATS
from k2cli.server.output.typed_formats import PAIR_FORMATS, TYPED_FORMATS
from k2cli.server.structured.calls import Function, call_grammar, calls_after_text
from tests.server.output.families import ANSWERS, K2_SECTION, TOOLS, Answer, k2_call
from tests.server.structured.functions import EVERY
from tests.server.structured.sampling import Model, model, read, sample

FORMS = [*TOOL_FORMATS]
ONLY_TOKENS = {"pythonic", "llama4_pythonic", "function_gemma", "gemma4"}
WORDS = [
    *(
        "null",
        "true",
        "12",
        "-3.5",
        "1e5",
        " ",
        "\n",
        "a",
        "é巴黎😀",
        "{",
        "}",
        "[",
        "<",
        "\\n",
        '"',
    ),
    *("auto", "fast", "&quot;", "</", "\n\n", "x: y", ",", "</b>", "```", "'", "(", "{}", "\\"),
]


def _snippets(parser: str) -> list[str]:
    """Return words, and the tags that the fixtures of a format have, whole and in part."""
    marks: set[str] = set()
    for answer in ANSWERS:
        if answer.parser == parser:
            marks |= set(re.findall(r"<[^<>]*>|\[[A-Z_]+\]", answer.output))
    return [*WORDS, *sorted(marks | {mark[:-1] for mark in marks})]


def _grammar(of: Model, functions: Sequence[Function], several: bool, after_text: bool) -> str:
    assert of.form.tools is not None
    text = of.text()
    make = calls_after_text if after_text else call_grammar
    return text.build(make(of.form.tools, functions, text, several=several))


_MODES = ((False, False), (True, False), (True, True))
"""Several calls, and after text."""


def _check(
    of: Model,
    functions: Sequence[Function],
    source: random.Random,
    count: int,
    modes: Sequence[tuple[bool, bool]] = _MODES,
) -> int:
    """Compare texts of a grammar with what is read in them. Return the number of calls."""
    calls = 0
    assert of.form.tools is not None
    snippets = _snippets(of.form.tools.name)
    schemas = {each.name: each.parameters or {"type": "object"} for each in functions}
    for several, after_text in modes:
        matcher = of.matcher(_grammar(of, functions, several, after_text))
        for _ in range(count):
            ids = sample(of, matcher.deep_copy(), source, snippets, source.randrange(120))
            if ids is None:
                continue
            cuts = [source.randrange(1000) for _ in range(5)]
            found = read(of, ids, functions, cuts)
            shown = "".join(piece.text for piece in of.pieces(ids, []))
            assert after_text or found.text.strip() == "", shown
            assert after_text or found.calls, shown
            assert several or len(found.calls) == 1, shown
            for call in found.calls:
                arguments = json.loads(call.arguments)
                assert isinstance(arguments, dict), shown
                jsonschema.Draft202012Validator(schemas[call.name]).validate(arguments)
                assert call.complete, shown
            calls += len(found.calls)
    return calls


@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize("parser", FORMS)
def test_what_a_grammar_allows_is_read_as_calls_that_obey(parser: str, plain: bool) -> None:
    if plain and parser in ONLY_TOKENS:
        with pytest.raises(ApiError, match=f"{parser}.*has no token"):
            _grammar(model(parser, plain), EVERY, True, False)
        return
    assert _check_all(model(parser, plain), random.Random(parser), 3) > 40


@pytest.mark.soak
@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize("parser", FORMS)
def test_much_that_grammars_allow(parser: str, plain: bool) -> None:
    if not (plain and parser in ONLY_TOKENS):
        for seed in range(10):
            _check_all(model(parser, plain), random.Random(seed), 20)


def _check_all(of: Model, source: random.Random, count: int) -> int:
    functions = [each for each in EVERY if _is_possible(of, each)]
    assert of.form.tools is not None
    if of.form.tools.name == "function_gemma":
        assert len(functions) > 4
    else:
        assert functions == list(EVERY)
    calls = _check(of, functions, source, 4 * count)
    for each in functions:
        calls += _check(of, [each], source, count, [(source.random() < 0.5, False)])
    return calls


def _is_possible(of: Model, function: Function) -> bool:
    try:
        _grammar(of, [function], False, False)
    except ApiError:
        return False
    return True


def _calls_of(answer: Answer, of: Model) -> str:
    """Return the part of an answer that is calls."""
    assert of.form.tools is not None
    if answer.parser == "harmony":
        after = answer.output.partition("<|start|>assistant<|channel|>commentary to=")[2]
        return f"<|channel|>commentary to={after.rpartition('<|start|>')[0]}"
    if answer.parser == "kimi_k3":
        begin = answer.output.index("<|open|>tools")
        return answer.output[begin:].removesuffix("<|close|>message<|sep|>")
    begins = [answer.output.find(marker) for marker in of.form.tools.opens]
    begin = min([begin for begin in begins if begin >= 0], default=0)
    if answer.parser in ("mistral", "llama3_json", "llama4_pythonic"):
        return answer.output[begin:]
    typed, pairs = TYPED_FORMATS.get(answer.parser), PAIR_FORMATS.get(answer.parser)
    closing = of.form.tools.tokens
    if typed is not None:
        closing = (typed.section_end or typed.call_end,)
    if pairs is not None:
        closing = (pairs.section_end,)
    end = max(answer.output.rfind(mark) + len(mark) for mark in closing)
    assert end > begin + 20
    return answer.output[begin:end]


def _functions(answer: Answer) -> list[Function]:
    """Return the tools of the fixtures, with parameters in the order of an answer's arguments."""
    order = [key for call in answer.calls for key in call.arguments]
    found = []
    for tool in TOOLS:
        schema = tool["function"]["parameters"]
        keys = sorted(schema["properties"], key=lambda key: order.index(key) if key in order else 9)
        properties = {key: schema["properties"][key] for key in keys}
        # FunctionGemma writes no objects, which one of the tools has.
        strict = answer.parser != "function_gemma"
        found.append(
            Function(tool["function"]["name"], {**schema, "properties": properties}, strict)
        )
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize(
    "answer",
    [answer for answer in ANSWERS if answer.parser in FORMS],
    ids=lambda answer: answer.name,
)
def test_what_models_write_is_allowed(answer: Answer, plain: bool) -> None:
    if plain and answer.parser in ONLY_TOKENS:
        pytest.skip("refused")
    if plain and answer.name == "Mistral":
        pytest.skip("without the token [ARGS], models write lists")
    of = model(answer.parser, plain, without=("[ARGS]",) if answer.name == "Mistral 7B" else ())
    written, functions = _calls_of(answer, of), _functions(answer)
    for several in (True, False):
        matcher = of.matcher(_grammar(of, functions, several, False))
        ids = of.ids(written)
        count = matcher.try_consume_tokens(ids)
        if several or len(answer.calls) == 1:
            assert count == len(ids), written[count:]
            assert matcher.is_accepting()
        else:
            assert count < len(ids)
    matcher = of.matcher(_grammar(of, functions, True, True))
    ids = of.ids(written)
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


_REQUIRED = Function(
    "find",
    {
        "type": "object",
        "properties": {"word": {"enum": ["a", "b"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["word", "count"],
        "additionalProperties": False,
    },
    strict=True,
)
_WRONG = [
    ("found", {"word": "a", "count": 1}),
    ("find", {"word": "a"}),
    ("find", {"word": "c", "count": 1}),
    ("find", {"word": "a", "count": 10}),
    ("find", {"word": "a", "count": "x"}),
    ("find", {"word": "a", "count": True}),
    ("find", {"word": "a", "count": 1, "more": 1}),
    ("find", {}),
]


def _raw(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tagged(arguments: dict[str, object], form: str) -> str:
    """Write arguments, with ``{key}``, ``{value}``, ``{is_text}`` and ``{kind}`` in a form."""
    return "".join(
        form.format(
            key=key,
            value=_raw(value),
            is_text=str(isinstance(value, str)).lower(),
            kind="string" if isinstance(value, str) else "number",
        )
        for key, value in arguments.items()
    )


_DSML = (
    '<｜DSML｜invoke name="{}">\n',
    '<｜DSML｜parameter name="{key}" string="{is_text}">{value}</｜DSML｜parameter>\n',
    "</｜DSML｜invoke>\n",
)
_PAIRS = ("{}\n", "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n", "")
_LONGCAT = tuple(part.replace("arg_", "longcat_arg_") for part in _PAIRS)
_TAGS = {
    "kimi_k3": (
        '<|open|>call tool="{}" index="1"<|sep|>',
        '<|open|>argument key="{key}" type="{kind}"<|sep|>{value}<|close|>argument<|sep|>',
        "<|close|>call<|sep|>",
    ),
    "deepseek_v32": _DSML,
    "deepseek_v4": _DSML,
    "qwen3_coder": (
        "<function={}>\n",
        "<parameter={key}>\n{value}\n</parameter>\n",
        "</function>\n",
    ),
    "minimax_m2": (
        '<invoke name="{}">\n',
        '<parameter name="{key}">{value}</parameter>\n',
        "</invoke>\n",
    ),
    "minicpm5": ('<function name="{}">', '<param name="{key}">{value}</param>', "</function>"),
    "muse_spark": (
        '<atem:invoke name="{}">',
        '<atem:parameter name="{key}">{value}</atem:parameter>',
        "</atem:invoke>",
    ),
    "glm47": _PAIRS,
    "laguna": _PAIRS,
    "longcat": _LONGCAT,
}
_SECTIONS = {
    "kimi_k3": ("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
    "deepseek_v32": ("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    "deepseek_v4": ("<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"),
    "minimax_m2": ("<minimax:tool_call>\n", "</minimax:tool_call>"),
    "minicpm5": ("", ""),
    "muse_spark": ("<atem:function_calls>", "</atem:function_calls>"),
    "longcat": ("<longcat_tool_call>", "</longcat_tool_call>"),
}


def _written(parser: str, name: str, arguments: dict[str, object]) -> str:
    """Write a call as models of a family do."""
    if parser in _TAGS:
        begin, each, end = _TAGS[parser]
        before, after = _SECTIONS.get(parser, ("<tool_call>", "</tool_call>"))
        before += "\n" if parser == "qwen3_coder" else ""
        return f"{before}{begin.format(name)}{_tagged(arguments, each)}{end}{after}"
    body = json.dumps(arguments, ensure_ascii=False)
    python = ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())
    match parser:
        case "kimi_k2":
            return K2_SECTION.format(k2_call(f"functions.{name}:7", body))
        case "deepseek_v3":
            begin = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
            end = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            return f"{begin}{name}<｜tool▁sep｜>{body}{end}"
        case "json_tools":
            return f'<tool_call>\n{{"name": "{name}", "arguments": {body}}}\n</tool_call>'
        case "llama3_json":
            return f'{{"name": "{name}", "parameters": {body}}}'
        case "mistral":
            return f"[TOOL_CALLS]{name}[ARGS]{body}"
        case "harmony":
            header = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
            return f"{header}{body}<|call|>"
        case "pythonic":
            return f"<|tool_call_start|>[{name}({python})]<|tool_call_end|>"
        case "llama4_pythonic":
            return f"[{name}({python})]"
    gemma, quote = _tagged(arguments, "{key}:{value},").removesuffix(","), '<|"|>'
    if parser == "function_gemma":
        quote = "<escape>"
    for word in (value for value in arguments.values() if isinstance(value, str)):
        gemma = gemma.replace(f":{word}", f":{quote}{word}{quote}")
    marks = TOOL_FORMATS[parser].tokens
    return f"{marks[0]}call:{name}{{{gemma}}}{marks[1]}"


@pytest.mark.parametrize("parser", FORMS)
def test_wrong_calls_are_rejected(parser: str) -> None:
    of = model(parser)
    matcher = of.matcher(_grammar(of, [_REQUIRED], False, False))

    def accepts(name: str, arguments: dict[str, object]) -> bool:
        copy, ids = matcher.deep_copy(), of.ids(_written(parser, name, arguments))
        return bool(copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting())

    assert accepts("find", {"word": "a", "count": 9})
    for name, arguments in _WRONG:
        assert not accepts(name, arguments), (name, arguments)
