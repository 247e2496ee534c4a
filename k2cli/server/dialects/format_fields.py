"""Fields by which clients of Chat and Completions ask for an answer in a format."""

from __future__ import annotations

from typing import Any

from k2cli.server.client_request import AnswerFormat
from k2cli.server.dialects.answer_formats import (
    llama_cpp_formats,
    only_format,
    response_format,
    vllm_formats,
)
from k2cli.server.dialects.body import Body


class FormatFields(Body):
    """OpenAI's field, and those of vLLM and llama.cpp. A request may have one of them."""

    response_format: dict[str, Any] | None = None
    # Fields of vLLM, and its older ones.
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # Fields of llama.cpp.
    grammar: str | None = None
    json_schema: Any = None

    @property
    def answer_format(self) -> AnswerFormat | None:
        """The format of the answer, or None for any text.

        Raises:
            ApiError: 400 if it is not understood, or there are two.
        """
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        return only_format(
            [
                response_format(self.response_format, "response_format"),
                *vllm_formats(self.structured_outputs, guided),
                *llama_cpp_formats(self.grammar, self.json_schema),
            ]
        )
