"""Conversations as clients send them, in the form that each model's template reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from k2cli.errors import K2Error
from k2cli.models.text.chat_template import ChatTemplate
from k2cli.models.text.conversation import ConversationRenderer
from k2cli.models.text.tokenizer import Tokenizer

# How templates of published models write a call: the part around the arguments.
FORMS = {
    # GLM 4.5 and its successors iterate a mapping (mlx-openai-server#189, vllm-mlx#347).
    "items": "{% for k, v in tc.function.arguments.items() %}<{{ k }}={{ v }}>{% endfor %}",
    "items filter": "{% for k, v in tc.function.arguments | items %}<{{ k }}={{ v }}>{% endfor %}",
    "keys": "{% set a = tc.function.arguments %}{% for k in a %}<{{ k }}={{ a[k] }}>{% endfor %}",
    # Llama and Mistral print JSON of a mapping; of a text they would print a quoted text.
    "tojson": "{{ tc.function.arguments | tojson }}",
    # DeepSeek R1 adds texts.
    "added": "{{ '```json\n' + tc['function']['arguments'] + '\n```' }}",
    # K2 and Qwen3 take both.
    "both": "{% if tc.function.arguments is string %}{{ tc.function.arguments }}"
            "{% else %}{{ tc.function.arguments | tojson }}{% endif %}",
}  # fmt: skip
MAPPING = {"items", "items filter", "keys", "tojson"}
FRAME = (
    "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}"
    "{{% for tc in m.tool_calls or [] %}}[{{{{ tc.function.name }}}} {}]{{% endfor %}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
)


def _renderer(source: str) -> ConversationRenderer:
    return ConversationRenderer(ChatTemplate(source, {}))


def _render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    defaults: dict[str, Any] = {
        "add_generation_prompt": True, "continue_last": False, "variables": {}
    }  # fmt: skip
    tools = options.pop("tools", None)
    return _renderer(source).render(messages, tools, **{**defaults, **options})


def _call(
    arguments: Any, identifier: str = "call_8f3", name: str = "get_weather"
) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": identifier, "type": "function", "function": function}


def _history(arguments: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [_call(arguments)]},
    ]


@pytest.mark.parametrize("form", FORMS)
def test_arguments_reach_each_template_in_its_form(form: str) -> None:
    source = FRAME.format(FORMS[form])
    renderer = _renderer(source)
    assert renderer.argument_form == ("mapping" if form in MAPPING else "text")
    sent = '{"city":  "北京", "days": 3}'
    shown = _render(source, _history(sent))
    if form in ("items", "items filter", "keys"):
        assert "[get_weather <city=北京><days=3>]" in shown
    elif form == "tojson":
        assert '[get_weather {"city": "北京", "days": 3}]' in shown
    else:
        assert sent in shown  # letter by letter, as the model wrote it
    as_mapping = _render(source, _history({"city": "北京", "days": 3}))
    assert as_mapping.replace("  ", " ") == shown.replace("  ", " ")


def test_arguments_that_are_no_object_are_refused_by_place() -> None:
    source = FRAME.format(FORMS["items"])
    for wrong, said in (("{", "is not JSON"), ("[1]", "not an object"), ("[" * 9999, "not JSON")):
        with pytest.raises(K2Error, match=rf"messages\[1\]\.tool_calls\[0\].*{said}"):
            _render(source, _history(wrong))
    for empty in ("", None, "{}"):
        assert "[get_weather ]" in _render(source, _history(empty))


def test_calls_that_a_template_would_leave_out_are_refused() -> None:
    with pytest.raises(K2Error, match="shows no tool calls"):
        _render("{% for m in messages %}{{ m.content }}{% endfor %}", _history("{}"))


def test_k2_gets_ids_of_its_own_form(toy_k2: Path) -> None:
    # exo#2281, llxprt-code#712: the model repeats the form of the ids that it sees.
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [_call('{"a":1}'), _call("{}", "functions.sum:7", "sum")],
        },
        {"role": "tool", "tool_call_id": "call_8f3", "content": "sunny"},
        {"role": "tool", "tool_call_id": "functions.sum:7", "content": "3"},
        {"role": "assistant", "content": None, "tool_calls": [_call("{}", "toolu_01", "sum")]},
        {"role": "tool", "tool_call_id": "toolu_01", "content": "4"},
    ]
    prompt = Tokenizer.load(toy_k2).chat_prompt(messages)
    begin, argument = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
    assert f"{begin}functions.get_weather:0{argument}" + '{"a":1}' in prompt
    assert f"{begin}functions.sum:7{argument}" in prompt
    assert f"{begin}functions.sum:2{argument}" in prompt
    assert "## Return of functions.get_weather:0\nsunny" in prompt
    assert "## Return of functions.sum:2\n4" in prompt
    assert "call_8f3" not in prompt
    assert "toolu" not in prompt


def test_ids_are_left_alone_for_other_models() -> None:
    source = FRAME.format("{{ tc.id }}")
    assert "call_8f3" in _render(source, _history("{}"))


@pytest.mark.parametrize(
    ("source", "variables", "shown"),
    [
        # Kimi K3 (llama.cpp's template); OpenAI's field has another name.
        ("{{ thinking_effort | default('max') }}", {"reasoning_effort": "low"}, "low"),
        ("{% set e = reasoning_effort or 'max' %}{{ e }}", {"reasoning_effort": "low"}, "low"),
        ("{{ thinking_effort }}", {"reasoning_effort": "low", "thinking_effort": "high"}, "high"),
        ("{{ enable_reasoning }}", {"reasoning_effort": "none"}, "False"),
        ("{{ use_thinking }}", {"reasoning_effort": "medium"}, "True"),
        ("{% set thinking = 'own' %}{{ thinking }}", {"reasoning_effort": "low"}, "own"),
        ("{{ thinking_effort | default('max') }}", {}, "max"),
    ],
)
def test_an_effort_reaches_a_template_under_its_own_name(
    source: str, variables: dict[str, Any], shown: str
) -> None:
    assert _render(source, [{"role": "user", "content": "a"}], variables=variables) == shown


def test_tools_are_shown_or_known_not_to_be() -> None:
    assert not _renderer(FRAME.format("")).shows_tools
    assert _renderer(
        "{% if tools is defined and tools %}{{ tools | tojson }}{% endif %}"
    ).shows_tools
    llama = "{% if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}{{ tools }}"
    assert _renderer(llama).shows_tools


FIRST_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def test_system_messages_are_joined_where_a_template_wants_one() -> None:
    # opencode#15059, Rapid-MLX#1543.
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Say blue."},
    ]
    shown = "<system>Be brief.\n\nBe kind.\n\nSay blue.<user>Hi"
    assert _render(FIRST_ONLY, messages) == shown
    any_place = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert _render(any_place, messages).endswith("<user>Hi<system>Say blue.")
    refusing = FIRST_ONLY + "{{ raise_exception('no') }}"
    with pytest.raises(K2Error, match="System message must be"):
        _render(refusing, messages)


CONTINUED = {
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}",
    "trimmed": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>\n{% endfor %}",
    "last": "{% for m in messages %}{{ m.content }}{{ '|' if not loop.last }}{% endfor %}<end>",
}


@pytest.mark.parametrize("source", CONTINUED.values(), ids=CONTINUED)
def test_an_answer_is_continued_as_transformers_does(source: str) -> None:
    messages = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "one, two, one, two"},
    ]
    ((expected,), _) = render_jinja_template(
        [messages], chat_template=source, continue_final_message=True
    )
    got = _render(source, messages, continue_last=True, add_generation_prompt=False)
    assert got == expected
    assert got.endswith("one, two, one, two")


def test_a_template_that_rewrites_the_answer_cannot_continue_it() -> None:
    source = "{% for m in messages %}{{ m.content | length }}{% endfor %}"
    with pytest.raises(K2Error, match="cannot continue"):
        _render(source, [{"role": "assistant", "content": "a"}], continue_last=True)


def test_k2_continues_an_answer(toy_k2: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, "}]
    prompt = Tokenizer.load(toy_k2).chat_prompt(messages, continue_last=True)
    assert prompt.endswith("<|im_assistant|>assistant<|im_middle|>Hello, ")
