"""What other servers get wrong: each rule of the parser, on Kimi's markers unless it says more."""

from __future__ import annotations

import json

import pytest

from k2cli.errors import K2Error
from k2cli.server.client_request import OutputOptions
from k2cli.server.output.emitter import MAX_CALLS
from k2cli.server.output.events import (
    AnswerText,
    Blocks,
    CallBlock,
    PlainOutput,
    ReasoningBlock,
    TextBlock,
)
from k2cli.server.output.known_formats import REASONING_FORMATS, TOOL_FORMATS
from k2cli.server.output.output_format import NONE, OutputFormat, choose_output_format
from tests.server.output.families import K2_SECTION, K2_TEMPLATE, TOOLS, k2_call
from tests.server.output.parsing import format_of, parse, pieces_of, run, value

CALL = K2_SECTION.format(k2_call("functions.now:0", "{}"))


def k2(text: str, **more: object) -> Blocks:
    return parse("kimi_k2", text, template=K2_TEMPLATE, **more)  # type: ignore[arg-type]


def kinds(found: Blocks) -> list[object]:
    return [
        (type(block), block.name if isinstance(block, CallBlock) else block.text)
        for block in found.blocks
    ]


def test_the_prompt_opens_the_reasoning() -> None:
    found = k2("Hm.</think>Yes.", inside=True)
    assert (found.reasoning, found.text) == ("Hm.", "Yes.")


@pytest.mark.parametrize("plain", [(), ("<think>", "</think>")])
def test_the_model_opens_the_reasoning_again(plain: tuple[str, ...]) -> None:
    found = k2("<think>Hm.</think>Yes.", inside=True, plain=plain)
    assert (found.reasoning, found.text) == ("Hm.", "Yes.")


def test_a_call_ends_reasoning_and_a_late_marker_is_no_text() -> None:
    found = k2("Hm." + CALL + "</think>Yes.", inside=True)
    assert kinds(found) == [
        (ReasoningBlock, "Hm."),
        (CallBlock, "now"),
        (TextBlock, "Yes."),
    ]
    plain = k2("Hm." + CALL + "</think>Yes.", inside=True, plain=("</think>", "<think>"))
    assert kinds(plain) == kinds(found)


def test_text_before_between_and_after_calls() -> None:
    found = k2("a " + CALL + "\n" + CALL.replace(":0", ":1") + " b")
    assert kinds(found) == [
        (TextBlock, "a "),
        (CallBlock, "now"),
        (CallBlock, "now"),
        (TextBlock, " b"),
    ]
    assert [call.call_id for call in found.calls] == ["functions.now:0", "functions.now:1"]


def test_reasoning_between_calls_and_empty_reasoning() -> None:
    found = k2("<think></think>" + CALL + "<think>More.</think>Done.")
    assert kinds(found) == [
        (CallBlock, "now"),
        (ReasoningBlock, "More."),
        (TextBlock, "Done."),
    ]


@pytest.mark.parametrize(
    "arguments",
    ['{"a": tru}', "{'a': 1}", "city=Paris", '{"a": "b', "[1, 2", '{"a": 1}}', "a\n\nb"],
)
def test_arguments_that_are_not_json_are_passed_on(arguments: str) -> None:
    found = k2(K2_SECTION.format(k2_call("functions.f:0", f" {arguments} ")) + "x")
    assert [(call.arguments, call.complete) for call in found.calls] == [(arguments, True)]
    assert found.text == "x"


@pytest.mark.parametrize("arguments", ['{"a": tru}', '{"a": [1, 2}', '{"a": "b', "nonsense"])
def test_arguments_in_an_object_that_are_not_json_are_passed_on(arguments: str) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": ' + arguments + "}\n</tool_call>x"
    found = parse("json_tools", text)
    assert [(call.name, call.complete) for call in found.calls] == [("f", True)]
    assert found.calls[0].arguments.startswith(arguments)
    assert found.text == "x"


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_no_arguments_are_an_empty_object(text: str) -> None:
    found = k2(K2_SECTION.format(k2_call("functions.now:0", text)))
    assert [(call.arguments, call.complete) for call in found.calls] == [("{}", True)]


def test_other_empty_arguments_are_an_empty_object() -> None:
    for output in ('{"name": "now"}', '{"name": "now", "arguments": null}'):
        found = parse("json_tools", f"<tool_call>{output}</tool_call>")
        assert [(call.arguments, call.complete) for call in found.calls] == [("{}", True)]
    for parser, output in (
        ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>"),
        ("minimax_m2", '<minimax:tool_call><invoke name="now"></invoke></minimax:tool_call>'),
        ("glm47", "<tool_call>now\n</tool_call>"),
    ):
        found = parse(parser, output)
        assert [(call.name, call.arguments) for call in found.calls] == [("now", "{}")]


def test_arguments_may_stand_first_or_be_a_text() -> None:
    first = '{"arguments": {"a": [1]}, "name": "f"}'
    text = '{"name": "f", "arguments": "{\\"a\\": [1]}"}'
    for output in (first, text):
        found = parse("json_tools", f"<tool_call>{output}</tool_call>")
        assert [(call.name, value(call)) for call in found.calls] == [("f", {"a": [1]})]


def test_markers_in_ordinary_letters_stay_text() -> None:
    form = format_of("kimi_k2", K2_TEMPLATE)
    options = OutputOptions(True, TOOLS)
    text = "The markers are <think> and </think> and " + CALL
    blocks = Blocks()
    blocks.add(run(form.parser(options), pieces_of(text, [], None)))
    assert (blocks.text, blocks.calls) == (text, [])


def test_markers_without_a_token_are_read_from_the_text() -> None:
    plain = format_of("kimi_k2", K2_TEMPLATE).marker_tokens(OutputOptions(True, TOOLS)).values()
    found = k2("<think>Hm.</think>Yes. The marker is <think>." + CALL, plain=list(plain))
    assert kinds(found) == [
        (ReasoningBlock, "Hm."),
        (TextBlock, "Yes. The marker is <think>."),
        (CallBlock, "now"),
    ]


def test_markers_of_calls_are_text_without_tools() -> None:
    form = format_of("json_tools")
    for options in (OutputOptions(True), OutputOptions(True, [])):
        assert set(form.marker_tokens(options).values()) == {"<think>", "</think>"}
    found = parse("json_tools", "<tool_call>{}</tool_call>", tools=None)
    assert found.text == "<tool_call>{}</tool_call>"
    assert isinstance(form.parser(OutputOptions(False, TOOLS)), PlainOutput)


def test_cut_off_within_reasoning_and_text() -> None:
    found = k2("<think>Hm. </thi")
    assert (found.reasoning, found.text) == ("Hm. </thi", "")
    found = parse("kimi_k2", "Hm. </thi", inside=True, plain=("</think>",))
    assert (found.reasoning, found.text) == ("Hm. </thi", "")


def test_cut_off_within_a_call() -> None:
    section = K2_SECTION.format(k2_call("functions.get_weather:0", '{"city": "Paris"}'))
    end = section.index("ris")
    found = k2(section[:end])
    assert [(c.name, c.arguments, c.complete) for c in found.calls] == [
        ("get_weather", '{"city": "Pa', False)
    ]
    # Complete arguments end a call, even if its last marker is missing.
    found = k2(section[: section.index("<|tool_call_end|>")])
    assert [call.complete for call in found.calls] == [True]
    # The name is not certain yet: what was written is text.
    found = k2(section[: section.index("<|tool_call_argument")])
    assert (found.text, found.calls) == ("<|tool_call_begin|>functions.get_weather:0", [])


@pytest.mark.parametrize(
    ("parser", "text", "arguments"),
    [
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx",
            '{"a": "1", "b": "x',
        ),
        (
            "minimax_m2",
            '<minimax:tool_call><invoke name="f"><parameter name="a">1</parameter><parameter na',
            '{"a": "1"',
        ),
        ("glm47", "<tool_call>f<arg_key>a</arg_key><arg_value>x", '{"a": "x'),
        ("json_tools", '<tool_call>{"name": "f", "arguments": {"a": [1, ', '{"a": [1,'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "x', '{"a": "x'),
    ],
)
def test_cut_off_within_a_call_of_others(parser: str, text: str, arguments: str) -> None:
    found = parse(parser, text)
    assert [(c.name, c.arguments, c.complete) for c in found.calls] == [("f", arguments, False)]


def test_a_section_without_its_last_markers_goes_on() -> None:
    calls = CALL.replace("<|tool_call_end|>", "").removesuffix("<|tool_calls_section_end|>")
    found = k2(calls + k2_call("functions.now:1", "{}"))
    assert [(c.call_id, c.complete) for c in found.calls] == [
        ("functions.now:0", True),
        ("functions.now:1", True),
    ]


def test_a_tool_that_was_not_declared_is_passed_on() -> None:
    found = k2(K2_SECTION.format(k2_call("functions.nonsense:3", '{"a": 1}')))
    assert [(c.name, c.call_id) for c in found.calls] == [("nonsense", "functions.nonsense:3")]


def test_calls_without_a_section() -> None:
    call = "<function=now>\n</function>\n"
    found = parse("qwen3_coder", "a " + call + "</tool_call>b<think>c</think>")
    assert (found.text, found.reasoning) == ("a b", "c")
    assert [(c.name, c.complete) for c in found.calls] == [("now", True)]
    for text in ("write <function=name> here", "<function=" + "x" * 3000):
        found = parse("qwen3_coder", text)
        assert (found.text, found.calls) == (text, [])
    found = parse("qwen3_coder", call + "</think>d", inside=True)
    assert (found.reasoning, found.text) == (call.strip(), "d")
    found = k2("a" + k2_call("functions.now:0", "{}") + "<think>b</think>c")
    assert (found.text, found.reasoning, len(found.calls)) == ("ac", "b", 1)


def test_other_forms_of_kimis_header() -> None:
    for header, name in (("now:0", "now"), ("functions.now", "now"), (" functions.a.b:12 ", "a.b")):
        found = k2(K2_SECTION.format(k2_call(header, "{}")))
        assert [call.name for call in found.calls] == [name]
    found = k2(CALL.replace("<|tool_call_argument_begin|>", ""))
    assert [(c.call_id, c.arguments) for c in found.calls] == [("functions.now:0", "{}")]


def test_a_number_alone_names_the_only_tool() -> None:
    section = K2_SECTION.format(k2_call("0", '{"city": "Paris"}'))
    found = k2(section, tools=TOOLS[1:2])
    assert [(c.name, c.call_id) for c in found.calls] == [("get_weather", "0")]
    assert [call.name for call in k2(section).calls] == ["0"]


def test_harmony_without_tools_and_cut_off() -> None:
    calls = '<|channel|>commentary to=functions.now<|message|>{"a": 1'
    found = parse("harmony", "<|channel|>final<|message|>Yes.<|start|>assistant" + calls)
    assert found.text == "Yes."
    assert [(c.name, c.arguments, c.complete) for c in found.calls] == [("now", '{"a": 1', False)]
    found = parse("harmony", calls, tools=None)
    assert (found.text, found.reasoning, found.calls) == ("", '{"a": 1', [])
    found = parse("harmony", "<|channel|>analysis<|message|>Hm", tools=None)
    assert (found.text, found.reasoning) == ("", "Hm")
    found = parse("harmony", "No header<|end|>.", tools=None)
    assert found.text == "No header."


def test_ids_of_k2_have_the_form_that_templates_want() -> None:
    found = parse("json_tools", '<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    assert found.calls[0].call_id.startswith("call_")
    found = parse("mistral", "[TOOL_CALLS]now[ARGS]{}")
    assert len(found.calls[0].call_id) == 9
    assert found.calls[0].call_id.isalnum()


def test_newlines_beside_markers() -> None:
    qwen = "<think>\nHm.\n\nWell.\n</think>\n\nYes.\n"
    found = parse("json_tools", qwen)
    assert (found.reasoning, found.text) == ("Hm.\n\nWell.", "Yes.\n")
    found = k2(qwen)
    assert (found.reasoning, found.text) == ("\nHm.\n\nWell.\n", "\n\nYes.\n")
    found = parse("json_tools", "\n\n<think>\n\n</think>\n\n")
    assert found.blocks == []
    assert parse("json_tools", "\n").text == "\n"


def test_a_name_that_is_too_long_is_text() -> None:
    long = k2_call(f"functions.{'x' * 257}:0", "{}")
    found = k2("a" + K2_SECTION.format(long) + CALL)
    assert [call.name for call in found.calls] == ["now"]
    assert "x" * 257 in found.text
    for parser, text in (
        ("json_tools", '<tool_call>{"name": "' + "x" * 257 + '", "arguments": {}}</tool_call>'),
        ("qwen3_coder", "<tool_call><function=" + "x" * 2000 + "></function></tool_call>"),
        ("glm47", "<tool_call>" + "x" * 257 + "<arg_key>a</arg_key></tool_call>"),
        ("mistral", "[TOOL_CALLS]" + "x" * 257 + "[ARGS]{}"),
    ):
        found = parse(parser, text)
        assert found.calls == []
        assert "x" * 257 in found.text


def test_calls_beyond_the_limit_are_text() -> None:
    calls = "".join(k2_call(f"functions.f:{n}", "{}") for n in range(MAX_CALLS + 2))
    found = k2(K2_SECTION.format(calls) + "end")
    assert len(found.calls) == MAX_CALLS
    assert f"functions.f:{MAX_CALLS}" in found.text
    assert found.text.endswith("end")
    assert all(call.complete for call in found.calls)


def test_only_the_first_call_where_one_is_wanted() -> None:
    text = "a" + K2_SECTION.format(
        k2_call("functions.now:0", "{}") + k2_call("functions.now:1", "{}")
    )
    found = k2(text + "b", parallel=False)
    assert [call.call_id for call in found.calls] == ["functions.now:0"]
    assert found.text == "a"


def test_objects_that_are_no_calls_are_text() -> None:
    for text in ('{"city": "Paris"}', '{"name": 3}', "{", '{"name": "Paris", "x": 1', "[a](b)"):
        found = parse("llama3_json", text)
        assert (found.text, found.calls) == (text, [])
    for text in ("[a](b) c", "[get_weather", "[", "[1, 2]", "[f(x)] is Python"):
        found = parse("llama4_pythonic", text)
        assert (found.text, found.calls) == (text, [])
    found = parse("json_tools", "<tool_call>what?</tool_call>")
    assert (found.text, found.calls) == ("what?", [])


def test_reasoning_tokens_are_counted_without_markers() -> None:
    form = format_of("kimi_k2", K2_TEMPLATE)
    options = OutputOptions(True, TOOLS)
    tokens = set(form.marker_tokens(options).values())
    for text, count in (
        ("<think>abc</think>de", 3),
        ("<think>abc", 3),
        ("<think></think>abc", 0),
        ("abc" + CALL, 0),
        ("<think>abc" + CALL + "de", 3),
    ):
        whole: list[int] = []
        for cuts in (whole, None):
            parser = form.parser(options)
            run(parser, pieces_of(text, tokens, cuts))
            assert parser.reasoning_tokens == count


def test_an_object_that_is_no_call_is_not_held_back() -> None:
    parser = format_of("llama3_json").parser(OutputOptions(True, TOOLS))
    shown = ""
    for piece in pieces_of('{"city": "Paris", ', []):
        shown += "".join(e.text for e in parser.push(piece) if isinstance(e, AnswerText))
    assert shown == '{"city": "Paris", '


def test_text_is_held_back_only_while_a_marker_may_begin() -> None:
    form = format_of("json_tools", plain=("<think>", "</think>", "<tool_call>", "</tool_call>"))
    parser = form.parser(OutputOptions(True, TOOLS))
    shown = []
    for letter in "Hi <b> <tool":
        events = parser.push(pieces_of(letter, [])[0])
        shown.append("".join(event.text for event in events if isinstance(event, AnswerText)))
    assert shown == ["H", "i", " ", "", "<b", ">", " ", "", "", "", "", ""]


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (K2_TEMPLATE + "<think></think>", "kimi_k2", "think"),
        (K2_TEMPLATE, "kimi_k2", None),
        ("<｜tool▁calls▁begin｜>", "deepseek_v3", None),
        ("<think></think><tool_call><arg_key>", "glm47", "think"),
        ("<tool_call>{{ tool_call.name }}", "json_tools", None),
        ("<tool_call>\n<function=a>\n<parameter=b>", "qwen3_coder", None),
        ("<minimax:tool_call>", "minimax_m2", None),
        ('<|start_header_id|>{"parameters": ', "llama3_json", None),
        ("[TOOL_CALLS]", "mistral", None),
        ("<|channel|>analysis<|message|><|end|>", "harmony", "harmony"),
        ("", None, None),
        (None, None, None),
    ],
)
def test_the_template_decides(
    template: str | None, tools: str | None, reasoning: str | None
) -> None:
    found = choose_output_format(template, {}, lambda text: None)
    assert (found.tools.name if found.tools else None) == tools
    assert (found.reasoning.name if found.reasoning else None) == reasoning


def test_the_vocabulary_decides_where_there_is_no_template() -> None:
    vocabulary = {"<|open|>": 7, "<|close|>": 8, "<|sep|>": 9, "<|end_of_msg|>": 10}
    found = choose_output_format(None, {}, vocabulary.get)
    assert found.tools is not None
    assert found.reasoning is not None
    assert (found.tools.name, found.reasoning.name) == ("kimi_k3", "kimi_k3")
    assert found.marker_tokens(OutputOptions(True, TOOLS)) == {
        number: text for text, number in vocabulary.items()
    }


def test_names_override_and_unknown_ones_are_refused() -> None:
    def chosen(tools: str | None, reasoning: str | None) -> OutputFormat:
        template = K2_TEMPLATE + "<think></think>"
        return choose_output_format(template, {}, lambda text: None, tools, reasoning)

    found = chosen("hermes", "deepseek_r1")
    assert found.tools is not None
    assert found.reasoning is not None
    assert (found.tools.name, found.reasoning.name) == ("json_tools", "think_open")
    assert (chosen("none", "none").tools, chosen("none", "none").reasoning) == (None, None)
    for tools, reasoning, known in (
        ("kimi", None, [NONE, *TOOL_FORMATS]),
        (None, "kimi", [NONE, *REASONING_FORMATS]),
    ):
        with pytest.raises(K2Error, match="named 'kimi'") as error:
            chosen(tools, reasoning)
        assert all(name in (error.value.hint or "") for name in known)
    named = choose_output_format(None, {"tool_parser_type": "longcat"}, lambda text: None)
    assert named.tools is not None
    assert named.tools.name == "longcat"


def test_the_prompt_decides_where_an_answer_begins() -> None:
    form = format_of("kimi_k2", K2_TEMPLATE)
    for prompt, continued, inside in (
        ("<|im_middle|><think>", None, True),
        ("<|im_start|>assistant\n<think>\n", None, True),
        ("<|im_middle|><think></think>", None, False),
        ("the user writes <think> here<|im_end|><|im_middle|>", None, False),
        ("<|im_middle|><think>Hm", "<think>Hm", True),
        ("<|im_middle|><think>Hm</think>Yes", "<think>Hm</think>Yes", False),
        ("<|im_middle|><think></think>Yes", "Yes", False),
    ):
        assert form.begins_in_reasoning(prompt, continued) == inside
    always = format_of("kimi_k2", K2_TEMPLATE, reasoning="think_open")
    assert always.begins_in_reasoning("<|im_middle|>")
    assert not always.begins_in_reasoning("<|im_middle|><think></think>")
    assert not format_of("kimi_k2", reasoning="none").begins_in_reasoning("<think>")


def test_typed_values_that_do_not_fit_are_text() -> None:
    text = (
        "<tool_call><function=get_weather><parameter=days>many</parameter>"
        "<parameter=city>" + "[" * 5000 + "</parameter></function></tool_call>"
    )
    found = parse("qwen3_coder", text)
    assert json.loads(found.calls[0].arguments) == {"days": "many", "city": "[" * 5000}


def test_values_with_tags_in_them_are_text() -> None:
    for parser, before, repeated, after in (
        ("minimax_m2", '<invoke name="f"><parameter name="a">', "<invoke name=x>", "</parameter>"),
        (
            "kimi_k3",
            '<|open|>call tool="f"<|sep|><|open|>argument key="a"<|sep|>',
            "<|open|>callx",
            "<|close|>argument<|sep|>",
        ),
        ("glm47", "f<arg_key>a</arg_key><arg_value>", "<arg_key>x\n</arg_key>", "</arg_value>"),
    ):
        form = format_of(parser)
        assert form.tools is not None
        found = parse(parser, form.tools.opens[0] + before + repeated * 3000 + after)
        assert found.calls[0].arguments == '{"a": ' + json.dumps(repeated * 3000)


def test_braces_without_a_pair_are_no_call() -> None:
    text = "call:x{" * 2000
    found = parse("gemma4", f"<|tool_call>{text}<tool_call|>")
    assert (found.text, found.calls) == (f"<|tool_call>{text}<tool_call|>", [])


def test_strings_that_would_cost_quadratic_time_are_no_call() -> None:
    # The parser of Gemma 4 goes through the whole text for each string: 5 s for 260,000 letters.
    quotes = '<|"|>' * 20_000
    found = parse("gemma4", f"<|tool_call>call:x{{a:{quotes}}}<tool_call|>")
    assert (found.text.count(quotes), found.calls) == (1, [])
    some = ",".join(['<|"|>b<|"|>'] * 200)
    found = parse("gemma4", f"<|tool_call>call:x{{a:[{some}]}}<tool_call|>")
    assert json.loads(found.calls[0].arguments) == {"a": ["b"] * 200}


def test_a_list_of_thousands_of_python_calls_is_text() -> None:
    # Python's parser takes a second for each 80,000 letters of them, and 1,000 calls are the most.
    calls = "f(a=1)," * 10_000
    found = parse("pythonic", f"<|tool_call_start|>[{calls}]<|tool_call_end|>")
    assert (found.text.count(calls), found.calls) == (1, [])
    found = parse("pythonic", f"<|tool_call_start|>[f(a='{'(x) ' * 5000}')]<|tool_call_end|>")
    assert json.loads(found.calls[0].arguments) == {"a": "(x) " * 5000}
