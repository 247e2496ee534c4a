"""Options of a launch that no client could use are refused before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli import choices
from k2cli.errors import UsageError
from k2cli.launch.request import LaunchRequest, checked_request
from k2cli.server.output import known_formats, output_format


@pytest.mark.parametrize(
    "key", [" ", "\n", "s3cr3t\n", " s3cr3t", "s3 cr3t", "a\x00b", "a\udcffb", ""]
)
def test_a_key_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(UsageError, match="the API key is") as refused:
        checked_request(LaunchRequest("demo", api_key=key))
    assert not key.strip() or key.strip() not in str(refused.value)


@pytest.mark.parametrize("key", ["k2-secret", "s3cret-cl\u00e9", "a" * 200, None])
def test_a_key_that_can_be_sent(key: str | None) -> None:
    assert checked_request(LaunchRequest("demo", api_key=key)).api_key == key


@pytest.mark.parametrize(
    "origin",
    ["evil", "", "http://", "ftp://a", "http://a/b", "http://a?b", "http://a#b", "http://[", "null",
     "http://a:x", "http://a:99999", "http://user@a", "http://a b"],
)  # fmt: skip
def test_what_is_not_an_origin(origin: str) -> None:
    with pytest.raises(UsageError, match="is not an origin"):
        checked_request(LaunchRequest("demo", cors_origins=(origin,)))


def test_origins_and_names_are_written_as_clients_send_them() -> None:
    request = LaunchRequest(
        "demo",
        allowed_hosts=("Studio.local", "[FE80::1]"),
        cors_origins=("https://Chat.Example/", "http://[::1]:3000", "*"),
    )
    checked = checked_request(request)
    assert checked.allowed_hosts == ("studio.local", "[fe80::1]")
    assert checked.cors_origins == ("https://chat.example", "http://[::1]:3000", "*")


@pytest.mark.parametrize("name", ["", "a b", "a:80", "http://a", "a/b", "[", "a\n"])
def test_what_is_not_the_name_of_a_host(name: str) -> None:
    with pytest.raises(UsageError, match="is not a name"):
        checked_request(LaunchRequest("demo", allowed_hosts=(name,)))


def test_aliases_are_names_that_clients_send() -> None:
    names = ("claude-sonnet-4-5", "openai/gpt-4.1", "gpt-4o", "opus[1m]", "gpt-4o")
    checked = checked_request(LaunchRequest("demo", aliases=names))
    assert checked.aliases == names[:4]
    for wrong in ("", " ", "a b", "a\n", "-a", "a" * 300, "n\x1b[0m", "ä"):
        with pytest.raises(UsageError, match="is not a name of a model"):
            checked_request(LaunchRequest("demo", aliases=(wrong,)))


def test_parsers_are_those_of_the_server() -> None:
    tools = {output_format.NONE, *known_formats.TOOL_FORMATS, *known_formats.TOOL_ALIASES}
    assert sorted(choices.TOOL_PARSERS) == sorted(tools)
    reasoning = {
        output_format.NONE,
        *known_formats.REASONING_FORMATS,
        *known_formats.REASONING_ALIASES,
    }
    assert sorted(choices.REASONING_PARSERS) == sorted(reasoning)
    for name in choices.TOOL_PARSERS:
        request = checked_request(LaunchRequest("demo", tool_parser=name))
        assert output_format.choose_output_format("", {}, lambda text: None, request.tool_parser)


def test_an_unknown_parser_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"--tool-parser 'kimi' is not the name of") as error:
        checked_request(LaunchRequest("demo", tool_parser="kimi"))
    assert (error.value.hint or "").startswith("leave --tool-parser out")
    assert all(name in (error.value.hint or "") for name in choices.TOOL_PARSERS)
    with pytest.raises(UsageError, match=r"--reasoning-parser 'x' is not the name of"):
        checked_request(LaunchRequest("demo", reasoning_parser="x"))


def test_a_saved_plan_has_no_memory_for_projections_that_are_joined_on_request() -> None:
    plan = Path("plan.json")
    assert checked_request(LaunchRequest("demo", plan_file=plan, joins_projections=False))
    assert checked_request(LaunchRequest("demo", joins_projections=True)).joins_projections
    with pytest.raises(UsageError, match="--joined-projections needs memory"):
        checked_request(LaunchRequest("demo", plan_file=plan, joins_projections=True))
