"""Each adapter says what its agent needs, in a form that the agent reads, and never the key."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2cli.connect.config_file import plan_change, write_change
from k2cli.connect.describe import describe
from k2cli.connect.endpoint import Endpoint, Key, checked_model_name
from k2cli.connect.formats.jsonc import parse_json
from k2cli.connect.formats.toml import parse_toml
from k2cli.connect.formats.yaml import parse_yaml
from k2cli.connect.registry import AGENTS, agent_named
from k2cli.connect.settings import Agent
from k2cli.errors import K2Error, UsageError

PLAIN = Endpoint("http://127.0.0.1:8080", "kimi", 131_072, reasoning=True)
KEYED = replace(PLAIN, key=Key("k2-secret", ("/bin/k2", "connect", "env", "--show-key")))
AGENT = pytest.mark.parametrize("agent", AGENTS, ids=[agent.name for agent in AGENTS])
VARIABLES = (
    "CLAUDE_CONFIG_DIR", "CODEX_HOME", "OPENCODE_CONFIG", "XDG_CONFIG_HOME", "CONTINUE_GLOBAL_DIR",
    "CLINE_DIR", "CLINE_DATA_DIR",
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def _written(agent: Agent, endpoint: Endpoint) -> dict[str, Any]:
    """Write an agent's files; return their data by their paths below the home folder."""
    found = {}
    for change in agent.settings(endpoint).files:
        planned = plan_change(change)
        if planned.changes:
            write_change(planned)
        text = change.path.read_text()
        parse = {"toml": parse_toml, "yaml": parse_yaml}.get(change.format, parse_json)
        found[str(change.path.relative_to(Path.home()))] = parse(text)
    return found


def test_the_files_without_a_key() -> None:
    written = {}
    for agent in AGENTS:
        written |= _written(agent, PLAIN)
    assert set(written) == {
        ".claude/settings.json", ".codex/config.toml", ".config/opencode/opencode.json",
        ".aider.conf.yml", ".aider.model.metadata.json", ".cline/data/settings/providers.json",
        ".continue/config.yaml", ".config/zed/settings.json",
    }  # fmt: skip
    env = written[".claude/settings.json"]["env"]
    assert env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8080"
    assert env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "131072"
    assert env["ANTHROPIC_AUTH_TOKEN"] == "none"
    codex = written[".codex/config.toml"]
    assert codex["model_context_window"] == 131_072
    assert codex["model_providers"][codex["model_provider"]] == {
        "name": "k2", "base_url": "http://127.0.0.1:8080/v1", "wire_api": "responses",
    }  # fmt: skip
    opencode = written[".config/opencode/opencode.json"]
    assert opencode["model"] == "k2/kimi"
    model = opencode["provider"]["k2"]["models"]["kimi"]
    assert model["limit"] == {"context": 131_072, "output": 32_768}
    assert (model["tool_call"], model["reasoning"]) == (True, True)
    limits = written[".aider.model.metadata.json"][written[".aider.conf.yml"]["model"]]
    assert limits["max_input_tokens"] == 131_072
    (model,) = written[".continue/config.yaml"]["models"]
    assert model["defaultCompletionOptions"] == {"contextLength": 131_072, "maxTokens": 32_768}
    assert model["capabilities"] == ["tool_use"]
    zed = written[".config/zed/settings.json"]
    provider = zed["language_models"]["openai_compatible"]["k2"]
    assert provider["api_url"] == "http://127.0.0.1:8080/v1"
    assert provider["available_models"][0]["max_tokens"] == 131_072
    assert zed["agent"]["default_model"] == {"provider": "k2", "model": "kimi"}


@AGENT
def test_the_key_is_neither_printed_nor_written_where_a_reference_suffices(agent: Agent) -> None:
    settings = agent.settings(KEYED)
    assert "k2-secret" not in " ".join((*settings.arguments, *settings.start, *settings.notes))
    described = describe(agent, KEYED, "sh")
    assert "k2-secret" not in repr(described)
    assert "k2-secret" not in json.dumps(described.document("run"))
    for name, data in _written(agent, KEYED).items():
        path = Path.home() / name
        holds = "k2-secret" in path.read_text()
        assert holds == (agent.name == "cline"), data
        if holds:
            assert path.stat().st_mode & 0o777 == 0o600


def test_the_references_to_the_key() -> None:
    claude = _written(agent_named("claude"), KEYED)[".claude/settings.json"]
    assert claude["apiKeyHelper"] == "/bin/k2 connect env --show-key"
    assert "ANTHROPIC_AUTH_TOKEN" not in claude["env"]
    codex = _written(agent_named("codex"), KEYED)[".codex/config.toml"]
    auth = codex["model_providers"]["k2"]["auth"]
    assert [auth["command"], *auth["args"]] == list(KEYED.key.command)  # type: ignore[union-attr]
    opencode = _written(agent_named("opencode"), KEYED)[".config/opencode/opencode.json"]
    assert opencode["provider"]["k2"]["options"]["apiKey"] == "{env:K2_API_KEY}"
    aider = _written(agent_named("aider"), KEYED)[".aider.conf.yml"]
    assert "openai-api-key" not in aider
    (model,) = _written(agent_named("continue"), KEYED)[".continue/config.yaml"]["models"]
    assert model["apiKey"] == "${{ secrets.K2_API_KEY }}"


@pytest.mark.parametrize("endpoint", [PLAIN, KEYED])
def test_claude_code_gets_no_token_of_another_service(endpoint: Endpoint) -> None:
    """Its file counts more than variables, and its option more than the file."""
    option, settings = agent_named("claude").settings(endpoint).arguments
    assert option == "--settings"
    token = json.loads(settings)["env"]["ANTHROPIC_AUTH_TOKEN"]
    assert token == ("none" if endpoint.key is None else "")


@AGENT
def test_a_run_with_and_without_a_key_take_turns(agent: Agent) -> None:
    """What an earlier ``--write`` left does not contradict the next one."""
    first = _written(agent, PLAIN)
    assert _written(agent, KEYED) != first or agent.name in ("env", "zed")
    again = _written(agent, PLAIN)
    for data in (first, again):
        # This command is for runs with a key; a token in the file counts more than it.
        data.get(".claude/settings.json", {}).pop("apiKeyHelper", None)
    assert again == first
    assert all(not plan_change(change).changes for change in agent.settings(PLAIN).files)


@AGENT
def test_other_settings_of_the_user_stay(agent: Agent) -> None:
    mine: dict[str, str] = {
        ".claude/settings.json": '{"permissions": {"allow": ["Read"]}, "env": {"MINE": "1"}}',
        ".codex/config.toml": '# mine\nmodel = "gpt"\n[model_providers.other]\nname = "o"\n',
        ".config/opencode/opencode.json": '{\n  // mine\n  "x": 1,\n  "provider": {"o": {}}\n}',
        ".aider.conf.yml": "# mine\ndark-mode: true # dark\n",
        ".aider.model.metadata.json": '{"openai/other": {"max_tokens": 1}}',
        ".cline/data/settings/providers.json": '{"version": 2, "providers": {"cline": {"x": 1}}}',
        ".continue/config.yaml": "# mine\nname: Me\nversion: 0.1\nmodels:\n- name: o\n",
        ".config/zed/settings.json": '// mine\n{"theme": "x", "agent": {"version": "2"},}',
    }  # fmt: skip
    for change in agent.settings(PLAIN).files:
        text = mine[str(change.path.relative_to(Path.home()))]
        change.path.parent.mkdir(parents=True, exist_ok=True)
        change.path.write_text(text)
        write_change(plan_change(change))
        after = change.path.read_text()
        assert ("mine" in after) == ("mine" in text)
        parse: Any = {"toml": tomllib.loads, "yaml": parse_yaml}.get(change.format, parse_json)
        _check_kept(parse(text), parse(after))


def _check_kept(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        for name, value in before.items():
            _check_kept(value, after[name])
    elif isinstance(before, list):
        assert after[: len(before)] == before
    else:
        assert after == before or before == "gpt"


@AGENT
def test_a_certificate_of_a_private_authority_is_named(agent: Agent) -> None:
    endpoint = replace(PLAIN, url="https://studio-1:8080", authority=Path("/etc/k2/ca.pem"))
    settings = agent.settings(endpoint)
    named = [*settings.environment.values(), repr([change.patch for change in settings.files])]
    assert any("/etc/k2/ca.pem" in str(each) for each in named)


@AGENT
def test_a_server_that_tells_nothing_of_its_model(agent: Agent) -> None:
    endpoint = Endpoint("http://studio-1:8000", "other")
    document = describe(agent, endpoint, "sh").document(None)
    assert document["context_tokens"] is None
    assert "None" not in json.dumps(document)
    _written(agent, endpoint)


def test_advice_for_models_that_agents_cannot_use() -> None:
    small = replace(PLAIN, tools=False, context_tokens=8192)
    notes = " ".join(describe(agent_named("opencode"), small, "sh").notes)
    assert "knows no tools" in notes
    assert "8,192 tokens" in notes
    assert small.output_tokens == 2048
    # aider sends no tools; a program with an SDK sends prompts of its own length.
    assert "knows no tools" not in " ".join(describe(agent_named("aider"), small, "sh").notes)
    assert "8,192 tokens" not in " ".join(describe(agent_named("env"), small, "sh").notes)


@pytest.mark.parametrize(
    "name",
    [
        "{file:~/.ssh/id_rsa}",
        "{env:HOME}",
        "${{ secrets.OTHER }}",
        "a\nb",
        "a\x1b]52;",
        "",
        "-c",
        "'",
    ],
)
def test_a_server_cannot_have_its_name_of_a_model_replaced(name: str) -> None:
    with pytest.raises(K2Error, match="has characters"):
        checked_model_name(name)
    for plain in ("kimi", "mlx-community/Kimi-K2-Thinking", "Kimi K2 (4bit)", "qwen3:4b", "模型"):
        assert checked_model_name(plain) == plain


def test_an_agent_that_k2_does_not_know() -> None:
    assert agent_named("Claude Code").name == "claude"
    with pytest.raises(
        UsageError, match="'cursor' is no agent that k2 knows; it knows claude"
    ) as caught:
        agent_named("cursor")
    assert caught.value.hint is not None
    assert "k2 connect env" in caught.value.hint
