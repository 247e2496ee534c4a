"""Values with units, as users write and read them."""

from __future__ import annotations

import pytest

from k2cli.errors import UsageError
from k2cli.units import GB, GIB, format_bytes, parse_bytes, parse_latency, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"), [("131072", 131072), ("128k", 131072), ("1M", 2**20), ("-5", -5),
     ("131,072", 131072), ("131_072", 131072)],
)  # fmt: skip
def test_tokens_count_in_steps_of_1024(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


def test_decimal_and_binary_bytes_are_told_apart() -> None:
    assert parse_bytes("512GB") == parse_bytes("512 g") == 512 * GB
    assert parse_bytes("464GiB") == 464 * GIB
    assert format_bytes(parse_bytes("577.6GB")) == "577.6 GB"


@pytest.mark.parametrize("parse", [parse_tokens, parse_bytes, parse_latency])
@pytest.mark.parametrize("text", ["", "1e5", "12 parsecs", "0x10", "1,2", "9" * 5000 + "q"])
def test_what_is_no_value_is_named(parse: object, text: str) -> None:
    with pytest.raises(UsageError, match="' is not a") as caught:
        parse(text)  # type: ignore[operator]
    assert caught.value.message.startswith(f"'{text[:1000]}")  # a long message is cut
