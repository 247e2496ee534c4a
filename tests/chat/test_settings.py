"""``/set`` and the file of defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli.chat.settings import SETTINGS, ChatSettings, changed, described, read_settings
from k2cli.errors import K2Error, UsageError


def test_the_file_holds_what_set_can_set(tmp_path: Path) -> None:
    path = tmp_path / "chat.toml"
    assert read_settings(path) == ChatSettings()
    path.write_text(
        "temperature = 0.6\nmax_tokens = 500\nstats = false\nsystem = 'Be brief.'\n"
        "reasoning_effort = 'none'\n"
    )
    settings = read_settings(path)
    assert settings.system == "Be brief."
    assert not settings.stats
    sent = settings.options.members()
    assert sent == {"temperature": 0.6, "max_tokens": 500, "reasoning_effort": "none"}
    assert ("temperature", "0.6 (0 to 2)") in described(settings)
    assert changed(settings, "temperature", "default").options.temperature is None
    assert changed(settings, "stats", "default").stats


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour = 1", "'colour'"),
        ("temperature = 'hot'", "'hot'"),
        ("temperature = nan", "'nan'"),
        ("top_k = 1.5", "'1.5'"),
        ("seed = true", "'on'"),
        ("stats = []", "'a list'"),
        ("system = 1", "'system'"),
        ("temperature", "Expected '='"),
        (b"\xff", "utf-8"),
        ("stats = " + "[" * 100_000, "recursion"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(
    tmp_path: Path, text: str | bytes, named: str
) -> None:
    path = tmp_path / "chat.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as error:
        read_settings(path)
    assert str(path) in error.value.message
    assert named in error.value.message


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_takes_any_text(name: str) -> None:
    for text in ("", "x", "1e999", "-1e999", "9" * 5000):
        with pytest.raises(K2Error):
            changed(ChatSettings(), name, text)
