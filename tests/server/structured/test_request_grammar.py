"""The grammar of a request: what models write in each form is allowed and read, nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from k2cli.protocol import Grammar
from k2cli.server.client_request import AnswerFormat, AnswerOptions, OutputOptions, ToolChoice
from k2cli.server.errors import ApiError
from k2cli.server.output.events import Blocks, CallBlock
from k2cli.server.output.known_formats import REASONING_FORMATS, TOOL_FORMATS
from k2cli.server.output.output_format import NONE, OutputFormat, choose_output_format
from k2cli.server.structured.request_grammar import Prompted, request_grammar
from k2cli.server.text_assembler import Marker, Piece
from tests.server.structured.matching import Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FORMAT = AnswerFormat("json_schema", SCHEMA)
JSON, WRONG = '{"city": "Paris"}', '{"town": "Paris"}'
PAIRED = sorted(set(REASONING_FORMATS) - {"harmony", "kimi_k3"})
K2_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.{}:0<|tool_call_argument_begin|>{}"
    "<|tool_call_end|><|tool_calls_section_end|>"
)


def tool(name: str, strict: bool | None = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, "parameters": {**SCHEMA, **more}}
    function |= {} if strict is None else {"strict": strict}
    return {"type": "function", "function": function}


@dataclass
class Model:
    """A model's marks, and the grammars of requests to it."""

    form: OutputFormat
    vocabulary: Vocabulary
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, reasoning: str, tools: str = NONE, spelled: bool = False) -> Model:
        forms = (REASONING_FORMATS.get(reasoning), TOOL_FORMATS.get(tools))
        markers = [text for form in forms if form is not None for text in form.tokens]
        vocabulary = Vocabulary([] if spelled else sorted(set(markers)))
        form = choose_output_format(None, {}, vocabulary.token_id, tools, reasoning)
        return cls(form, vocabulary)

    def grammar(
        self, options: AnswerOptions, prompt: str = "", continued: str | None = None
    ) -> Grammar | None:
        inside = self.form.begins_in_reasoning(prompt, continued)
        output = OutputOptions(True, self.tools, options.parallel_calls, inside)
        return request_grammar(self.form, output, options, Prompted(prompt, continued))

    def takes(
        self,
        text: str,
        prompt: str = "",
        continued: str | None = None,
        wanted: AnswerFormat | None = FORMAT,
        **more: Any,
    ) -> bool:
        grammar = self.grammar(AnswerOptions(answer_format=wanted, **more), prompt, continued)
        assert grammar is not None
        return self.vocabulary.accepts(grammar.text, text, grammar.prefix)

    def reads(self, text: str, prompt: str = "", obeys_format: bool = True) -> Blocks:
        """What ``server.output`` makes of a text, whose markers are tokens if they have ids."""
        inside = self.form.begins_in_reasoning(prompt)
        options = OutputOptions(True, self.tools, True, inside, obeys_format=obeys_format)
        parser, blocks = self.form.parser(options), Blocks()
        known = self.form.marker_tokens(options).values()
        at = 0
        while at < len(text):
            found = max((one for one in known if text.startswith(one, at)), key=len, default="")
            piece = found or text[at]
            blocks.add(parser.push(Piece(piece, markers=(Marker(0, found),) if found else ())))
            at += len(piece)
        blocks.add(parser.finish())
        return blocks


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("name", PAIRED)
def test_a_format_follows_the_reasoning(name: str, spelled: bool) -> None:
    model = Model.of(name, spelled=spelled)
    form = REASONING_FORMATS[name]
    opened, closed = f"<user>Hi{form.opens}\n", f"<user>Hi{form.opens}\n{form.close}\n\n"
    thought = f"Hm, {{}}.{form.close}"
    for gap in ("", "\n\n"):
        assert model.takes(f"{thought}{gap}{JSON}", opened)
        blocks = model.reads(f"{thought}{gap}{JSON}", opened)
        assert json.loads(blocks.text) == {"city": "Paris"}
        assert blocks.reasoning == "Hm, {}."
    for text in (JSON, f"{thought}{WRONG}", f"{thought} Sure: {JSON}", "Hm", f"{thought}{JSON}x"):
        assert not model.takes(text, opened)
    assert model.takes(JSON, closed)
    assert not model.takes(f"{form.opens}{thought}{JSON}", closed)
    if not form.begins_inside:
        assert model.takes(JSON, "Hi")
        assert model.takes(f"{form.opens}{thought}\n{JSON}", "Hi")
        assert not model.takes(f"{form.opens}{thought}\n{WRONG}", "Hi")
        assert json.loads(model.reads(f"{form.opens}{thought}\n{JSON}").text)["city"] == "Paris"


def test_gpt_oss_thinks_in_messages_and_answers_in_the_final_one() -> None:
    model = Model.of("harmony", "harmony")
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>"
    constrained = "<|channel|>final <|constrain|>json<|message|>"
    for text in (final, thought + final, thought * 2 + constrained):
        assert model.takes(text + JSON, "<|start|>assistant")
        assert not model.takes(text + WRONG, "<|start|>assistant")
        blocks = model.reads(text + JSON)
        assert (json.loads(blocks.text), blocks.reasoning) == (
            {"city": "Paris"},
            "Hm." * text.count("Hm."),
        )
    for text in (JSON, thought, f"<|channel|>commentary<|message|>{JSON}"):
        assert not model.takes(text, "<|start|>assistant")
    assert model.takes("is}", f"{final}{{", "{", AnswerFormat("regex", r"\{is\}"))
    model.tools = [tool("f")]
    call = f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{JSON}"
    assert model.takes(thought + call, wanted=None, tool_choice=ToolChoice(required=True))
    assert model.takes(thought + call)
    assert not model.takes(final + JSON, wanted=None, tool_choice=ToolChoice(required=True))


def test_kimi_k3_answers_within_its_markers() -> None:
    model = Model.of("kimi_k3", "kimi_k3")
    opened = "<|open|>think<|sep|>"
    thought = "Hm.<|close|>think<|sep|>"
    answer = "<|open|>response<|sep|>{}<|close|>response<|sep|>"
    for end in ("", "<|close|>message<|sep|>"):
        text = thought + answer.format(JSON) + end
        assert model.takes(text, opened)
        blocks = model.reads(text, opened)
        assert (blocks.text, blocks.reasoning) == (JSON, "Hm.")
    assert model.takes(answer.format(JSON), f"{opened}{thought}")
    assert model.takes(f"{opened}{thought}{answer.format(JSON)}", "Hi")
    for text in (thought + JSON, thought + answer.format(WRONG), answer.format(JSON)):
        assert not model.takes(text, opened)


def test_each_kind_of_format() -> None:
    model = Model.of("think")
    opened = "<think>"
    kinds = [
        (AnswerFormat("json_object"), '{"a": [1, "b"]}', "[1]"),
        (AnswerFormat("regex", "[a-c]{2,3}/\\d"), "abc/5", "abc5"),
        (AnswerFormat("choice", ["ja", "nein", 'nein\n"x"']), 'nein\n"x"', "neinja"),
        (AnswerFormat("lark", 'start: "a" b+\nb: /[0-9]/\n%ignore " "'), "a 1 2", "b1"),
        (AnswerFormat("gbnf", 'root ::= "a" b+\nb ::= [0-9]'), "a12", "a"),
        (AnswerFormat("lark", f"start: %json {json.dumps(SCHEMA)}"), JSON, WRONG),
    ]
    for wanted, right, wrong in kinds:
        assert model.takes(f"Hm</think>{right}", opened, wanted=wanted), wanted
        assert not model.takes(f"Hm</think>{wrong}", opened, wanted=wanted), wanted
        output = OutputOptions()  # plain completions: from the first token
        plain = request_grammar(model.form, output, AnswerOptions(answer_format=wanted), Prompted())
        assert plain is not None
        assert model.vocabulary.accepts(plain.text, right)
        assert not model.vocabulary.accepts(plain.text, f"<think></think>{right}")


@pytest.mark.parametrize("kind", ["regex", "choice", "lark", "gbnf"])
def test_newlines_are_no_part_of_a_text_that_is_no_json(kind: Any) -> None:
    """After reasoning they belong to its marker; without it a client would get them."""
    value = {"choice": ["ja"], "lark": 'start: "ja"', "gbnf": 'root ::= "ja"'}.get(kind, "ja")
    wanted = AnswerFormat(kind, value)
    for name in (NONE, "think"):
        model = Model.of(name)
        for prompt in ("Hi", "<think></think>"):
            assert model.takes("ja", prompt, wanted=wanted)
            assert not model.takes("\nja", prompt, wanted=wanted)
    thought = "<think>Hm</think>\n\nja"
    assert model.takes(thought, "Hi", wanted=wanted)
    assert model.reads(thought).text == "ja"


def test_calls_or_the_format() -> None:
    model = Model.of("think", "kimi_k2")
    model.tools = [tool("f"), tool("g", required=[])]
    call, free = K2_CALL.format("f", JSON), K2_CALL.format("g", "{}")
    text = f"Hm</think>{call}"
    assert model.takes(text, "<think>")
    assert model.takes(f"Hm</think>{JSON}", "<think>")
    assert not model.takes(f"Hm</think>{K2_CALL.format('f', WRONG)}", "<think>")
    (found,) = model.reads(text, "<think>").calls
    assert (found.name, found.arguments) == ("f", JSON)

    required = ToolChoice(required=True)
    assert model.takes(text, "<think>", wanted=None, tool_choice=required)
    assert model.takes(f"Hm</think>{free}", "<think>", wanted=None, tool_choice=required)
    for other in ("Hm</think>", "Hm</think>Sure", f"Hm</think>{JSON}"):
        assert not model.takes(other, "<think>", tool_choice=required)
    named = replace(required, names=("f",))
    assert model.takes(text, "<think>", wanted=None, tool_choice=named)
    assert not model.takes(f"Hm</think>{free}", "<think>", wanted=None, tool_choice=named)

    two = K2_CALL.format("f", JSON + "<|tool_call_end|><|tool_call_begin|>functions.f:1"
                         "<|tool_call_argument_begin|>" + JSON)  # fmt: skip
    for choice, parallel, several in (
        (required, True, True),
        (required, False, False),
        (named, True, False),
    ):
        taken = model.takes(two, wanted=None, tool_choice=choice, parallel_calls=parallel)
        assert taken is several


def test_text_is_free_until_a_strict_call() -> None:
    model = Model.of("think", "kimi_k2")
    model.tools = [tool("f"), tool("g", strict=False)]
    assert model.grammar(AnswerOptions()) is None
    model.tools = [tool("f", strict=True), tool("g", additionalProperties=True)]
    call, other = K2_CALL.format("f", JSON), K2_CALL.format("g", '{"city": "x", "y": 1}')
    for text in ("", "Sure. {", f"Let me see.{call}", call, other):
        assert model.takes(f"Hm</think>{text}", "<think>", wanted=None), text
        assert model.takes(text, "<think></think>", wanted=None), text
    for text in (K2_CALL.format("f", WRONG), K2_CALL.format("h", "{}"), "<|tool_call_begin|>"):
        assert not model.takes(f"Hm</think>So{text}", "<think>", wanted=None), text
    allowed = AnswerOptions(tool_choice=ToolChoice(names=("g",)))
    grammar = model.grammar(allowed)
    assert grammar is not None
    assert model.vocabulary.accepts(grammar.text, "Well. " + K2_CALL.format("g", JSON))
    assert not model.vocabulary.accepts(grammar.text, K2_CALL.format("f", JSON))


def test_a_continued_answer_belongs_to_the_format() -> None:
    model = Model.of("think")
    begun = "<think>Hm</think>\n" + '{"ci'
    assert model.takes('ty": "Paris"}', f"Hi{begun}", begun)
    assert not model.takes(JSON, f"Hi{begun}", begun)
    assert model.takes('ty": "x"}', 'Hi{"ci', '{"ci')
    thinking = "<think>Hm, so"
    assert model.takes(f" on</think>{JSON}", f"Hi{thinking}", thinking)
    assert not model.takes(JSON, f"Hi{thinking}", thinking)


def test_json_is_not_taken_for_calls() -> None:
    """In forms in which calls begin with a letter or a tag that JSON may have, too."""
    model = Model.of(NONE, "llama3_json")
    model.tools = [tool("f")]
    wanted = '{"name": "f", "parameters": {"city": "Paris"}}'
    assert model.reads(wanted).text == wanted
    assert isinstance(model.reads(wanted, obeys_format=False).blocks[0], CallBlock)
    with pytest.raises(ApiError, match="writes calls as an answer of JSON"):
        model.takes(JSON)
    coder = Model.of(NONE, "qwen3_coder")
    coder.tools = [tool("f")]
    wanted = '{"x": "<function=f>\\n<parameter=city>\\nParis\\n</parameter>\\n</function>"}'
    assert coder.reads(wanted).text == wanted


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": ToolChoice(names=("h",))}, "tool_choice",
     "tool_choice: there is no tool 'h'; the tools are: f, g"),
    ({"answer_format": FORMAT, "ignore_stop_tokens": True}, "k2.ignore_stop_tokens", "ends where"),
    ({"answer_format": AnswerFormat("json_schema", {"type": "x"}, "text.format.schema")},
     "text.format.schema", "text.format.schema/type: x is not a type"),
    ({"answer_format": AnswerFormat("regex", "(?=a)", "of")}, "of", "of: look-around, including"),
    ({"answer_format": AnswerFormat("regex", "\\", "of")}, "of", "of: is no regular expression"),
    ({"answer_format": AnswerFormat("regex", "a" * 65_537, "r")}, "r", "has 65537 letters"),
    ({"answer_format": AnswerFormat("lark", "start: b", "r")}, "r", 'unknown name: "b"'),
    ({"answer_format": AnswerFormat("lark", "begin: /a/", "r")}, "r", "start"),
    ({"answer_format": AnswerFormat("lark", 'start: %json {"minimum": "a"}', "r")}, "r",
     "r: %json/minimum: 'a' is not of type 'number'"),
    ({"answer_format": AnswerFormat("lark", "start: %json {", "r")}, "r", "%json: is not JSON"),
    ({"answer_format": AnswerFormat("lark", 'start: %lark { start: "a" }', "r")}, "r", "%lark is"),
    ({"answer_format": AnswerFormat("lark", "start: r0\n" + "\n".join(
        f'r{i}: "a" r{i + 1}' for i in range(4_000)) + '\nr4000: "b"', "r")}, "r", "the most are"),
    ({"answer_format": AnswerFormat("gbnf", "root ::= b", "r")}, "r", "Rule 'b' not found"),
    ({"answer_format": AnswerFormat("gbnf", 'root ::= "a', "r")}, "r", "is not GBNF"),
    ({"answer_format": AnswerFormat("gbnf", "root ::= " + "(" * 9_000, "r")}, "r", "too deeply"),
    ({"answer_format": AnswerFormat("gbnf", "a ::= b\n" * 301, "r")}, "r", "has 301 rules"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "param", "part"), REFUSED)
def test_what_cannot_be_held_is_refused(options: dict[str, Any], param: str, part: str) -> None:
    model = Model.of("think", "kimi_k2")
    model.tools = [tool("f"), tool("g")]
    with pytest.raises(ApiError) as caught:
        model.grammar(AnswerOptions(**options))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert part in caught.value.message


def test_schemas_of_tools_are_checked_if_they_count() -> None:
    model = Model.of("think", "kimi_k2")
    wrong = tool("f", strict=True, uniqueItems=True)
    model.tools = [wrong]
    with pytest.raises(ApiError) as caught:
        model.grammar(AnswerOptions())
    assert caught.value.param == "tools[0].function.parameters"
    assert caught.value.message.startswith("tools[0].function.parameters/uniqueItems: ")
    wrong["function"]["strict"] = False
    assert model.grammar(AnswerOptions()) is None
    required = ToolChoice(required=True)
    assert model.takes(K2_CALL.format("f", JSON), wanted=None, tool_choice=required)
    for parameters in ({"type": "string"}, {"properties": 5}, {"pattern": "(?=a)"}, None):
        wrong["function"]["parameters"] = parameters
        assert model.takes(K2_CALL.format("f", WRONG), wanted=None, tool_choice=required)
        assert not model.takes(K2_CALL.format("f", "5"), wanted=None, tool_choice=required)
    wrong["function"] |= {"parameters": {"type": "string"}, "strict": True}
    with pytest.raises(ApiError, match="arguments are an object"):
        model.grammar(AnswerOptions())
    model.tools = [tool("f", strict=True), tool("f")]
    with pytest.raises(ApiError, match="two functions 'f'"):
        model.grammar(AnswerOptions())


def test_a_model_without_known_calls_cannot_be_held_to_them() -> None:
    model = Model.of("think")
    model.tools = [tool("f")]
    with pytest.raises(ApiError, match="the format in which this model writes calls is not known"):
        model.grammar(AnswerOptions(tool_choice=ToolChoice(required=True)))
    assert model.takes(JSON)
    assert not model.takes("Sure")
