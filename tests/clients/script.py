"""What the scripted model of the clients' tests does, and the tool that it calls."""

from __future__ import annotations

from typing import Any

from tests.support.scripted_answers import Rule

MODEL = "scripted"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
    "required": ["city"],
}
QUESTION = "How warm is it in Paris and in Berlin?"
LONG = "Count without an end."
THOUGHT = "Two cities, two calls."
ARGUMENTS = [{"city": "Paris", "unit": "celsius"}, {"city": "Berlin", "unit": "celsius"}]
IDS = ["functions.get_weather:0", "functions.get_weather:1"]
FINAL = "It is 11 degrees in Paris and 7 in Berlin."


def weather(city: str, unit: str) -> str:
    """Return what the tool returns."""
    return f"{ {'Paris': 11, 'Berlin': 7}[city] } degrees {unit}"


_CALLS = "".join(
    f'<|tool_call_begin|>{name}<|tool_call_argument_begin|>{{"city": "{arguments["city"]}", '
    f'"unit": "celsius"}}<|tool_call_end|>'
    for name, arguments in zip(IDS, ARGUMENTS, strict=True)
)
_SECTION = f"<|tool_calls_section_begin|>{_CALLS}<|tool_calls_section_end|>"

RULES = [
    Rule("<think></think>" + "1, 2, 3, " * 200, (LONG,), pause_seconds=0.5),
    Rule(
        f"<think>Both are known.</think>{FINAL}",
        (f"## Return of {IDS[0]}\n11 degrees", f"## Return of {IDS[1]}\n7 degrees"),
    ),
    Rule(f"<think>{THOUGHT}</think>I look.{_SECTION}", ("tool_declare", QUESTION)),
    Rule("<think>No tool.</think>I have no thermometer."),
]
