"""Answers as models of each family write them, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def tool(name: str, **properties: str) -> dict[str, Any]:
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("read_file", path="string", limit="integer"),
    tool("get_weather", city="string", days="integer", metric="boolean"),
    tool("write_file", path="string", content="string"),
    tool("search", query="string", filters="object", tags="array", zip="string"),
    tool("now"),
]


@dataclass(frozen=True)
class Call:
    name: str
    arguments: Any
    call_id: str | None = None


@dataclass(frozen=True)
class Answer:
    """An answer of a model. ``oracle`` are the texts that mlx-lm's parser gets, if it has one."""

    family: str
    parser: str
    output: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    oracle: tuple[str, ...] = ()
    template: str = ""
    plain: frozenset[str] = field(default=frozenset())
    """Markers that are no tokens of this model's vocabulary."""
    inside: bool = False

    @property
    def name(self) -> str:
        return self.family


K2_SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
K2_TEMPLATE = "<|im_middle|><|tool_calls_section_begin|>"


def k2_call(call_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


_K2_ONE = k2_call("functions.get_weather:0", '{"city": "Paris", "days": 3}')
_K2_TWO = _K2_ONE + k2_call(
    "functions.write_file:1", '{"path": "a.py", "content": "if x:\\n    print(\\"</think>\\")\\n"}'
)
_PARIS = {"city": "Paris", "days": 3}
_CODE = {"path": "a.py", "content": 'if x:\n    print("</think>")\n'}

_K3_CALLS = (
    '<|open|>call tool="get_weather" index="1"<|sep|>'
    '<|open|>argument key="city" type="string"<|sep|>Paris<|close|>argument<|sep|>'
    '<|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
    '<|open|>argument key="metric" type="boolean"<|sep|>true<|close|>argument<|sep|>'
    "<|close|>call<|sep|>"
    '<|open|>call tool="search" index="2"<|sep|>'
    '<|open|>json type="object"<|sep|>{"query": "a < b", "filters": {"x": [1, null]}}'
    "<|close|>json<|sep|><|close|>call<|sep|>"
    '<|open|>call tool="now" index="3"<|sep|><|close|>call<|sep|>'
)
_GLM_CALL = (
    "get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
    "<arg_key>metric</arg_key>\n<arg_value>true</arg_value>\n"
)
_GLM_SEARCH = (
    "search<arg_key>query</arg_key><arg_value>12</arg_value>"
    '<arg_key>filters</arg_key><arg_value>{"a": {"b": [1, 2]}}</arg_value>'
    "<arg_key>zip</arg_key><arg_value>01234</arg_value>"
)
_SEARCH = {"query": "12", "filters": {"a": {"b": [1, 2]}}, "zip": "01234"}
_HERMES = '\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n'
_HERMES_CODE = (
    '\n{"name": "write_file", "arguments": {"path": "a.py", '
    '"content": "if x:\\n    print(\\"</think>\\")\\n"}}\n'
)
_QWEN_CODER = (
    "\n<function=write_file>\n<parameter=path>\na.py\n</parameter>\n"
    '<parameter=content>\nif x:\n    print("</think>")\n\n</parameter>\n</function>\n'
)
_QWEN_SEARCH = (
    "\n<function=search>\n<parameter=query>\n12\n</parameter>\n<parameter=filters>\n"
    '{"a": {"b": [1, 2]}}\n</parameter>\n<parameter=zip>\n01234\n</parameter>\n</function>\n'
)
_MINIMAX = (
    '\n<invoke name="write_file">\n<parameter name="path">a.py</parameter>\n'
    '<parameter name="content">x = "é"</parameter>\n</invoke>\n'
    '<invoke name="search">\n<parameter name="query">12</parameter>\n'
    '<parameter name="filters">{"a": {"b": [1, 2]}}</parameter>\n'
    '<parameter name="zip">01234</parameter>\n</invoke>\n'
)
_MISTRAL = 'get_weather[ARGS]{"city": "Paris", "days": 3}'
_MISTRAL_LIST = (
    '[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}, '
    '{"id": "abcDEF123", "name": "now", "arguments": {}}]'
)
_LLAMA = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'
_PYTHONIC = '[get_weather(city="Paris", days=3), search(tags=["a", "b"], filters={"x": true})]'
_GEMMA3 = "call:get_weather{city:<escape>Paris<escape>,days:3}"
_GEMMA4 = 'call:get_weather{city:<|"|>Paris<|"|>,days:3}'
_MUSE = (
    '<atem:invoke name="get_weather"><atem:parameter name="city">Paris</atem:parameter>'
    '<atem:parameter name="days">3</atem:parameter></atem:invoke>'
)
_MINICPM = '"get_weather"><param name="city">Paris</param><param name="days">3</param>'
_DSML = "｜DSML｜"

ANSWERS = [
    Answer(
        "Kimi K2 0905",
        "kimi_k2",
        "I look it up.\n" + K2_SECTION.format(_K2_TWO),
        text="I look it up.\n",
        calls=(
            Call("get_weather", _PARIS, "functions.get_weather:0"),
            Call("write_file", _CODE, "functions.write_file:1"),
        ),
        oracle=(_K2_TWO,),
        template=K2_TEMPLATE,
    ),
    Answer(
        "Kimi K2 Thinking",
        "kimi_k2",
        "<think>Weather first.</think>Let me see." + K2_SECTION.format(_K2_ONE),
        text="Let me see.",
        reasoning="Weather first.",
        calls=(Call("get_weather", _PARIS, "functions.get_weather:0"),),
        oracle=(_K2_ONE,),
        template=K2_TEMPLATE,
    ),
    Answer(
        "Kimi K2.5, tools without the end of reasoning",
        "kimi_k2",
        " Weather first. " + K2_SECTION.format(_K2_ONE),
        reasoning=" Weather first. ",
        calls=(Call("get_weather", _PARIS, "functions.get_weather:0"),),
        oracle=(_K2_ONE,),
        template=K2_TEMPLATE,
        inside=True,
    ),
    Answer(
        "Kimi K2.6, a call in the middle",
        "kimi_k2",
        "a</think>\n\nbefore " + K2_SECTION.format(_K2_ONE) + "after",
        text="\n\nbefore after",
        reasoning="a",
        calls=(Call("get_weather", _PARIS, "functions.get_weather:0"),),
        oracle=(_K2_ONE,),
        template=K2_TEMPLATE,
        inside=True,
    ),
    Answer(
        "Kimi K3",
        "kimi_k3",
        "<|open|>think<|sep|>Hm.<|close|>think<|sep|><|open|>response<|sep|>Let me see."
        "<|close|>response<|sep|><|open|>tools<|sep|>"
        + _K3_CALLS
        + "<|close|>tools<|sep|><|close|>message<|sep|>",
        text="Let me see.",
        reasoning="Hm.",
        calls=(
            Call("get_weather", {**_PARIS, "metric": True}),
            Call("search", {"query": "a < b", "filters": {"x": [1, None]}}),
            Call("now", {}),
        ),
        oracle=(_K3_CALLS,),
    ),
    Answer(
        "DeepSeek V3.1",
        "deepseek_v3",
        "Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris", "days": 3}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        text="Ok.",
        calls=(Call("get_weather", _PARIS), Call("now", {})),
    ),
    Answer(
        "DeepSeek V3",
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>write_file\n```json\n"
        '{"path": "a.md", "content": "```\\n```"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>'
        "function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        calls=(Call("write_file", {"path": "a.md", "content": "```\n```"}), Call("now", {})),
    ),
    Answer(
        "DeepSeek V3.2",
        "deepseek_v32",
        f'Ok.\n\n<{_DSML}function_calls>\n<{_DSML}invoke name="search">\n'
        f'<{_DSML}parameter name="query" string="true">12</{_DSML}parameter>\n'
        f'<{_DSML}parameter name="tags" string="false">["a", 1]</{_DSML}parameter>\n'
        f"</{_DSML}invoke>\n</{_DSML}function_calls>",
        text="Ok.",
        calls=(Call("search", {"query": "12", "tags": ["a", 1]}),),
    ),
    Answer(
        "DeepSeek V4",
        "deepseek_v4",
        f'Hm.</think><{_DSML}tool_calls>\n<{_DSML}invoke name="now">\n</{_DSML}invoke>\n'
        f'<{_DSML}invoke name="search">\n<{_DSML}parameter name="query" string="true">a\nb'
        f"</{_DSML}parameter>\n</{_DSML}invoke>\n</{_DSML}tool_calls>",
        reasoning="Hm.",
        calls=(Call("now", {}), Call("search", {"query": "a\nb"})),
        inside=True,
    ),
    Answer(
        "gpt-oss",
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}<|call|>'
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>",
        text="Let me see.Done.",
        reasoning="Hm.",
        calls=(Call("get_weather", _PARIS), Call("now", {})),
    ),
    Answer(
        "GLM 4.5",
        "glm47",
        "\n<think>Hm.</think>\nOne moment.\n<tool_call>" + _GLM_CALL + "</tool_call>",
        text="One moment.",
        reasoning="Hm.",
        calls=(Call("get_weather", {**_PARIS, "metric": True}),),
        oracle=(_GLM_CALL,),
    ),
    Answer(
        "GLM 5",
        "glm47",
        "Hm.</think><tool_call>" + _GLM_SEARCH + "</tool_call><tool_call>now</tool_call>",
        reasoning="Hm.",
        calls=(Call("search", _SEARCH), Call("now", {})),
        oracle=(_GLM_SEARCH, "now"),
        inside=True,
    ),
    Answer(
        "Qwen3",
        "json_tools",
        "<think>\nHm.\n</think>\n\nTwo calls.\n<tool_call>"
        + _HERMES
        + "</tool_call>\n<tool_call>"
        + _HERMES_CODE
        + "</tool_call>",
        text="Two calls.",
        reasoning="Hm.",
        calls=(Call("get_weather", _PARIS), Call("write_file", _CODE)),
        oracle=(_HERMES, _HERMES_CODE),
    ),
    Answer(
        "Qwen3-Coder",
        "qwen3_coder",
        "I write.\n\n<tool_call>"
        + _QWEN_CODER
        + "</tool_call>\n<tool_call>"
        + _QWEN_SEARCH
        + "</tool_call>",
        text="I write.",
        calls=(Call("write_file", _CODE), Call("search", _SEARCH)),
        oracle=(_QWEN_CODER.strip(), _QWEN_SEARCH.strip()),
    ),
    Answer(
        "MiniMax M2",
        "minimax_m2",
        "Hm.\n</think>\n\n<minimax:tool_call>" + _MINIMAX + "</minimax:tool_call>",
        reasoning="Hm.",
        calls=(
            Call("write_file", {"path": "a.py", "content": 'x = "é"'}),
            Call("search", _SEARCH),
        ),
        oracle=(_MINIMAX,),
        inside=True,
    ),
    Answer(
        "Mistral",
        "mistral",
        "Ok.[TOOL_CALLS]" + _MISTRAL + "[TOOL_CALLS]now[ARGS]{}",
        text="Ok.",
        calls=(Call("get_weather", _PARIS), Call("now", {})),
        oracle=(_MISTRAL, "now[ARGS]{}"),
    ),
    Answer(
        "Mistral 7B",
        "mistral",
        "[TOOL_CALLS] " + _MISTRAL_LIST,
        calls=(Call("get_weather", _PARIS), Call("now", {}, "abcDEF123")),
        oracle=(_MISTRAL_LIST,),
    ),
    Answer("Llama 3.1", "llama3_json", _LLAMA, calls=(Call("get_weather", _PARIS),)),
    Answer(
        "Llama 3.1, marked",
        "llama3_json",
        "<|python_tag|>" + _LLAMA + "; " + _LLAMA,
        calls=(Call("get_weather", _PARIS), Call("get_weather", _PARIS)),
    ),
    Answer(
        "Llama 4",
        "llama4_pythonic",
        _PYTHONIC,
        calls=(
            Call("get_weather", _PARIS),
            Call("search", {"tags": ["a", "b"], "filters": {"x": True}}),
        ),
    ),
    Answer(
        "LFM2",
        "pythonic",
        "<|tool_call_start|>" + _PYTHONIC + "<|tool_call_end|>Done.",
        text="Done.",
        calls=(
            Call("get_weather", _PARIS),
            Call("search", {"tags": ["a", "b"], "filters": {"x": True}}),
        ),
        oracle=(_PYTHONIC,),
    ),
    Answer(
        "FunctionGemma",
        "function_gemma",
        f"<start_function_call>{_GEMMA3}<end_function_call>",
        calls=(Call("get_weather", _PARIS),),
        oracle=(_GEMMA3,),
    ),
    Answer(
        "Gemma 4",
        "gemma4",
        f"<|channel>thought\nHm.<channel|><|tool_call>{_GEMMA4}<tool_call|>",
        reasoning="Hm.",
        calls=(Call("get_weather", _PARIS),),
        oracle=(_GEMMA4,),
    ),
    Answer(
        "LongCat",
        "longcat",
        "<longcat_think>Hm.</longcat_think>\n<longcat_tool_call>"
        + _GLM_CALL.replace("arg_", "longcat_arg_")
        + "</longcat_tool_call>",
        reasoning="Hm.",
        calls=(Call("get_weather", {**_PARIS, "metric": True}),),
        oracle=(_GLM_CALL.replace("arg_", "longcat_arg_"),),
    ),
    Answer(
        "Laguna",
        "laguna",
        "<tool_call>" + _GLM_SEARCH + "</tool_call>",
        calls=(Call("search", _SEARCH),),
        oracle=(_GLM_SEARCH,),
    ),
    Answer(
        "Muse Spark",
        "muse_spark",
        "<atem:function_calls>" + _MUSE + "</atem:function_calls>",
        calls=(Call("get_weather", _PARIS),),
        oracle=(_MUSE,),
    ),
    Answer(
        "MiniCPM5",
        "minicpm5",
        "Ok. <function name="
        + _MINICPM
        + "</function>\n<function name="
        + _MINICPM
        + "</function>",
        text="Ok. ",
        calls=(Call("get_weather", _PARIS), Call("get_weather", _PARIS)),
        oracle=(_MINICPM, _MINICPM),
    ),
]
