"""Tags of the formats whose arguments have a tag each, by the name of the format."""

from __future__ import annotations

from k2cli.server.output.typed_calls import (
    PairFormat,
    TypedFormat,
    attribute,
    without_cdata,
)

DSML = "｜DSML｜"
"""The token in the tags of DeepSeek V3.2 and V4."""


def _dsml(section: str) -> TypedFormat:
    return TypedFormat(
        f"<{DSML}invoke",
        f"<{DSML}parameter",
        ">",
        f"</{DSML}parameter>",
        f"</{DSML}invoke>",
        f"</{DSML}{section}>",
        attribute("name"),
        attribute("name"),
        is_text=lambda header: attribute("string")(header) == "true",
    )


def _pairs(parser: str, prefix: str = "") -> PairFormat:
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    tags = ((f"<{key}>", f"</{key}>"), (f"<{value}>", f"</{value}>"))
    return PairFormat(parser, *tags, f"</{prefix}tool_call>")


TYPED_FORMATS: dict[str, TypedFormat] = {
    "kimi_k3": TypedFormat(
        "<|open|>call",
        "<|open|>argument",
        "<|sep|>",
        "<|close|>argument<|sep|>",
        "<|close|>call<|sep|>",
        "<|close|>tools<|sep|>",
        attribute("tool"),
        attribute("key"),
        raw=("<|open|>json", "<|close|>json<|sep|>"),
        is_text=lambda header: attribute("type")(header) in (None, "string"),
    ),
    "deepseek_v32": _dsml("function_calls"),
    "deepseek_v4": _dsml("tool_calls"),
    "qwen3_coder": TypedFormat(
        "<function=",
        "<parameter=",
        ">",
        "</parameter>",
        "</function>",
        "</tool_call>",
        parser="qwen3_coder",
    ),
    "minimax_m2": TypedFormat(
        "<invoke name=",
        "<parameter name=",
        ">",
        "</parameter>",
        "</invoke>",
        "</minimax:tool_call>",
        parser="minimax_m2",
        strip=str.strip,
    ),
    "minicpm5": TypedFormat(
        "<function name=",
        "<param name=",
        ">",
        "</param>",
        "</function>",
        parser="minicpm5",
        strip=without_cdata,
    ),
    "muse_spark": TypedFormat(
        "<atem:invoke",
        "<atem:parameter",
        ">",
        "</atem:parameter>",
        "</atem:invoke>",
        "</atem:function_calls>",
        attribute("name"),
        attribute("name"),
        parser="muse_spark",
        strip=str.strip,
    ),
}
PAIR_FORMATS: dict[str, PairFormat] = {
    "glm47": _pairs("glm47"),
    "laguna": _pairs("laguna"),
    "longcat": _pairs("longcat", "longcat_"),
}
