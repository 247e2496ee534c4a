"""Printed lines set a variable to exactly the value, whatever is in it."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k2cli.connect.endpoint import Endpoint, Key
from k2cli.connect.settings import KEY
from k2cli.connect.shells import Shell, lines, quoted, shell_of

ENDPOINT = Endpoint("http://127.0.0.1:8080", "kimi", key=Key("k2-secret", ("printf", "%s", "k$y")))
VALUES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
)


def _values(shell: Shell, program: str, values: list[str]) -> list[str]:
    names = [f"V{index}" for index in range(len(values))]
    script = "\n".join(lines(dict(zip(names, values, strict=True)), (), ENDPOINT, shell))
    command = f"{script}\nprintf '%s\\0' " + " ".join(f'"${name}"' for name in names)
    done = subprocess.run([program, "-c", command], capture_output=True, check=True, timeout=20)
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=8))
@example(["a'b", "$(touch x)", "`id`", '"', "\\", "a\nb", "-n", "!x", "~", "*", "{a,b}", "é😀"])
def test_sh_takes_each_value_as_it_is(values: list[str]) -> None:
    assert _values("sh", "sh", values) == values


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=8))
@example(["a'b", "(id)", "$HOME", "\\", "\\'", "a\nb", "~", "*", "{a,b}"])
def test_fish_takes_each_value_as_it_is(values: list[str]) -> None:
    assert _values("fish", "fish", values) == values


def test_quotes_of_fish_and_powershell() -> None:
    assert quoted("a'b\\c $x", "fish") == "'a\\'b\\\\c $x'"
    assert quoted("http://127.0.0.1:8080/v1", "fish") == "http://127.0.0.1:8080/v1"
    assert quoted("a'b’c $x `", "powershell") == "'a''b’’c $x `'"


def test_a_key_is_a_command_and_not_a_value() -> None:
    shown = {
        shell: list(lines({"K": KEY}, ("OLD",), ENDPOINT, shell))
        for shell in ("sh", "fish", "powershell")
    }
    assert shown == {
        "sh": ["unset OLD", "export K=\"$(printf %s 'k$y')\""],
        "fish": ["set -e OLD", "set -gx K (printf '%s' 'k$y')"],
        "powershell": [
            "Remove-Item Env:OLD -ErrorAction Ignore",
            "$env:K = (printf '%s' 'k$y')",
        ],
    }
    assert [_values("sh", "sh", ["x"])] == [["x"]]


def test_the_shell_of_the_user() -> None:
    assert shell_of("/usr/local/bin/fish") == "fish"
    assert shell_of("/bin/zsh") == shell_of("") == "sh"
