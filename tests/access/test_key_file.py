"""The file of named keys: who may read it, what is refused, and two writers at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from k2cli.access.key_file import create_key, key_file, read_keys, revoke_key
from k2cli.access.keys import chosen, digest_of, parse_choice, parse_duration
from k2cli.errors import K2Error, UsageError
from k2cli.protocol import KeyLimits
from tests.support.commands import K2, k2


def test_a_key_is_printed_once_and_only_its_digest_is_kept() -> None:
    done = k2("keys", "create", "alice", "--max-concurrent", "2", "--expires", "30d")
    assert done.returncode == 0, done.stderr
    secret = done.stdout.rstrip("\n")
    assert re.fullmatch(r"k2-[\w-]{43}", secret)
    assert secret not in done.stderr
    kept = key_file().read_text()
    assert secret not in kept
    assert digest_of(secret.encode()) in kept
    assert oct(key_file().stat().st_mode & 0o777) == "0o600"
    assert oct(key_file().parent.stat().st_mode & 0o777) == "0o700"
    shown = k2("keys", "list")
    assert "alice" in shown.stdout
    assert "2 at a time" in shown.stdout
    listed = k2("keys", "list", "--json")
    (key,) = json.loads(listed.stdout)["keys"]
    assert (key["name"], key["limits"]["max_concurrent"]) == ("alice", 2)
    assert key["expires"] - key["created"] == 30 * 86_400
    for text in (shown.stdout, shown.stderr, listed.stdout):
        assert digest_of(secret.encode()) not in text
        assert secret not in text


def test_json_of_create_and_revoke() -> None:
    made = json.loads(k2("keys", "create", "ci@build", "--json").stdout)
    assert made["schema_version"] == 1
    assert digest_of(made["api_key"].encode()) == read_keys()[0].digest
    assert made["key"]["name"] == "ci@build"
    gone = json.loads(k2("keys", "revoke", "ci@build", "--json").stdout)
    assert gone["revoked"]["key_id"] == made["key"]["key_id"]
    assert read_keys() == []


def test_creates_at_once_lose_no_key() -> None:
    names = [f"user-{number}" for number in range(8)]
    started = [
        subprocess.Popen([*K2, "keys", "create", name], stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    secrets = [process.communicate(timeout=60)[0].strip() for process in started]
    kept = {key.name: key.digest for key in read_keys()}
    assert kept == {
        name: digest_of(secret.encode()) for name, secret in zip(names, secrets, strict=True)
    }


def _ruin(path: Path, how: str) -> str:
    """Make the file one that must not be used; return a part of the message."""
    match how:
        case "wide":
            path.chmod(0o640)
            return "its mode is 0640"
        case "link":
            path.rename(path.with_name("elsewhere"))
            path.symlink_to("elsewhere")
            return "is a link"
        case "damaged":
            path.write_text('{"schema_version": 1, "keys": [')
            return "is damaged"
        case "a digest that is none":
            path.write_text(path.read_text().replace('"digest": "', '"digest": "x'))
            return "is damaged"
        case "later":
            path.write_text('{"schema_version": 7, "keys": {}, "new": 1}')
            return "written by a newer k2 (schema 7)"
    path.unlink()
    os.mkfifo(path, 0o600)
    return "not a regular file"


@pytest.mark.parametrize(
    "how", ["wide", "link", "damaged", "a digest that is none", "later", "fifo"]
)
def test_a_file_that_cannot_be_trusted_is_refused_and_left_alone(how: str) -> None:
    create_key("alice", KeyLimits())
    path = key_file()
    message = _ruin(path, how)
    before = os.lstat(path)
    content = None if how == "fifo" else path.read_bytes()
    for call in (
        read_keys,
        lambda: create_key("bob", KeyLimits()),
        lambda: revoke_key("alice"),
    ):
        with pytest.raises(K2Error) as caught:
            call()
        assert message in caught.value.message
        assert caught.value.hint
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert content is None or path.read_bytes() == content


@pytest.mark.parametrize("how", ["wide", "damaged", "link"])
def test_the_hint_works(how: str) -> None:
    create_key("alice", KeyLimits())
    _ruin(key_file(), how)
    with pytest.raises(K2Error) as caught:
        read_keys()
    command = (caught.value.hint or "").removeprefix("put it aside, and make the keys again: ")
    subprocess.run(command.partition(";")[0], shell=True, check=True)
    create_key("bob", KeyLimits())
    assert [key.name for key in read_keys()] == (["alice", "bob"] if how == "wide" else ["bob"])


def test_a_folder_that_others_can_read_is_refused() -> None:
    create_key("alice", KeyLimits())
    key_file().parent.chmod(0o755)
    with pytest.raises(K2Error, match="only this user can access") as caught:
        create_key("bob", KeyLimits())
    assert f"chmod 700 {key_file().parent}" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["", "all", "None", "-x", "a b", "a/b", "x" * 65, "é", "a\n"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError):
        create_key(name, KeyLimits())
    assert not key_file().exists()


def test_a_name_has_one_key() -> None:
    create_key("alice", KeyLimits())
    with pytest.raises(UsageError) as caught:
        create_key("alice", KeyLimits())
    # Not the command alone: copied, it would take the key from somebody who works with it.
    assert caught.value.hint.startswith("choose another name, or end the use of that key")
    with pytest.raises(UsageError, match="there is no key 'bob'"):
        revoke_key("bob")


def test_choices_and_durations() -> None:
    create_key("alice", KeyLimits())
    create_key("bob", KeyLimits())
    keys = read_keys()
    assert chosen(keys, parse_choice("all")) == keys
    assert chosen(keys, parse_choice("none")) == []
    assert [key.name for key in chosen(keys, parse_choice("bob, carol,bob"))] == ["bob"]
    assert [parse_duration(text) for text in ("45s", "12h", "1y")] == [45, 43_200, 31_536_000]
    for text in ("", "0d", "3", "-1d", "1.5h", "101y", "99999999999d", "٣d"):
        with pytest.raises(UsageError):
            parse_duration(text)
    for text in ("", "a,,b", "a b"):
        with pytest.raises(UsageError):
            parse_choice(text)


def test_commands_refuse_what_means_nothing() -> None:
    done = k2("keys", "create", "x", "--max-queued", "3")
    assert done.returncode == 2
    assert "--max-concurrent" in done.stderr
    assert k2("keys", "create", "x", "--max-concurrent", "0").returncode == 2
    assert not key_file().exists()
