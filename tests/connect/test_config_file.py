"""Files of other programs are changed as a whole or not at all, and the old one is kept."""

from __future__ import annotations

import os
import re
import resource
import stat
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from k2cli.connect.config_file import ConfigChange, Format, home_folder, plan_change, write_change
from k2cli.connect.formats.jsonc import Node
from k2cli.connect.formats.patch import ConfigError, IfMissing
from k2cli.errors import K2Error

PATCH = {"env": {"URL": "http://127.0.0.1:8080"}, "version": IfMissing(1)}
OLD = '{\n  "version": 7,\n  "permissions": {"allow": ["Read"]}\n}\n'


def _change(path: Path, *, private: bool = False) -> ConfigChange:
    return ConfigChange(path, "jsonc", PATCH, private)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_changed_and_its_copy_brings_it_back(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(OLD)
    path.chmod(0o640)
    planned = plan_change(_change(path))
    assert path.read_text() == OLD
    written = write_change(planned)
    assert '"version": 7' in path.read_text()
    assert "http://127.0.0.1:8080" in path.read_text()
    assert _mode(path) == 0o640
    assert written.copy is not None
    assert written.copy.read_text() == OLD
    assert _mode(written.copy) == 0o640
    assert not plan_change(_change(path)).changes  # a second time has nothing to do
    subprocess.run(["sh", "-c", written.undo], check=True)
    assert path.read_text() == OLD
    assert [each.name for each in tmp_path.iterdir()] == ["settings.json"]


def test_a_new_file_and_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b c" / "settings.json"
    written = write_change(plan_change(_change(path, private=True)))
    assert written.copy is None
    assert _mode(path) == 0o600
    assert path.read_text() == (
        '{\n  "env": {\n    "URL": "http://127.0.0.1:8080"\n  },\n  "version": 1\n}\n'
    )
    subprocess.run(["sh", "-c", written.undo], check=True)
    assert not path.exists()


def test_a_file_that_gets_a_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(OLD)
    path.chmod(0o664)
    written = write_change(plan_change(_change(path, private=True)))
    assert _mode(path) == 0o600
    assert written.copy is not None
    assert _mode(written.copy) == 0o600


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target = tmp_path / "dotfiles" / "settings.json"
    target.parent.mkdir()
    target.write_text(OLD)
    path = tmp_path / "settings.json"
    path.symlink_to(target)
    planned = plan_change(_change(path))
    assert str(target) in planned.difference()
    written = write_change(planned)
    assert path.is_symlink()
    assert "127.0.0.1" in target.read_text()
    assert written.copy is not None
    assert written.copy.parent == target.parent


def _state(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Return what a change of a file changes; to read it changes the time of the last access."""
    found = {each: each.lstat() for each in folder.iterdir()}
    return {
        path: (each.st_ino, each.st_mode, each.st_size, each.st_mtime_ns, each.st_ctime_ns)
        for path, each in found.items()
    }


def _refused(path: Path, reason: str) -> ConfigError:
    before = _state(path.parent)
    with pytest.raises(ConfigError, match=reason) as caught:
        plan_change(_change(path))
    assert _state(path.parent) == before
    assert str(path) in caught.value.message
    return caught.value


def test_what_is_no_file_of_the_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.symlink_to(tmp_path / "nowhere")
    assert "rm " in (_refused(path, "does not exist").hint or "")
    path.unlink()
    path.symlink_to(path)
    _refused(path, "cannot be read")
    path.unlink()
    path.mkdir()
    _refused(path, "is not a file")
    path.rmdir()
    os.mkfifo(path)
    _refused(path, "is not a file")
    path.unlink()
    path.symlink_to("/dev/zero")
    _refused(path, "is not a file")
    path.unlink()
    path.write_text(OLD)
    path.chmod(0o444)
    assert "chmod u+w" in (_refused(path, "read-only: its mode is 0444").hint or "")
    path.chmod(0o644)
    other = tmp_path / "other"
    other.hardlink_to(path)
    _refused(path, "has 2 names")
    other.unlink()
    with mock.patch("os.geteuid", return_value=os.geteuid() + 1):
        assert "chown" in (_refused(path, "belongs to another user").hint or "")
    plan_change(_change(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": "\xff"}', "is not UTF-8: byte 7 is 0xff"),
        (b'{"a": \0}', "null byte"),
        (b'{"a": 1', "line 1, column 8: a comma or '}' is missing"),
        (b'{"env": "text"}', "env is a text, and not a mapping"),
        (b" " * 300_000, "larger than"),
    ],
)
def test_what_cannot_be_read_for_certain_is_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    error = _refused(path, re.escape(reason))
    assert path.read_bytes() == content
    assert "Traceback" not in error.message


def test_an_edit_that_goes_wrong_is_not_written(tmp_path: Path) -> None:
    """Whatever a library does wrong, the text must say the same, and keep its comments."""
    path = tmp_path / "settings.json"
    path.write_text("// mine\n" + OLD)
    for wrong, reason in (
        ('{"env": {"URL": "http://127.0.0.1:8080"}, "version": 7}', "alter other settings"),
        (OLD.replace("7,", '7, "env": {"URL": "http://127.0.0.1:8080"},'), "lose a comment"),
    ):
        with (
            mock.patch("k2cli.connect.config_file.edit_json", return_value=wrong),
            pytest.raises(ConfigError, match=reason),
        ):
            plan_change(_change(path))


def test_a_file_that_changes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(OLD)
    planned = plan_change(_change(path))
    path.write_text("{}")
    with pytest.raises(ConfigError, match="was changed meanwhile"):
        write_change(planned)
    assert path.read_text() == "{}"
    planned = plan_change(_change(tmp_path / "new"))
    (tmp_path / "new").write_text("{}")
    with pytest.raises(ConfigError, match="was changed meanwhile"):
        write_change(planned)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(K2Error, match=r"cannot be (read|written)"):
        write_change(plan_change(_change(tmp_path / "file" / "settings.json")))


def test_a_byte_order_mark_and_line_ends_stay(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(b'\xef\xbb\xbf{\r\n\t"a": 1\r\n}\r\n')
    write_change(plan_change(_change(path)))
    content = path.read_bytes()
    assert content.startswith(b'\xef\xbb\xbf{\r\n\t"a": 1,\r\n\t"env": {\r\n\t\t"URL"')
    assert content.count(b"\n") == content.count(b"\r\n")


@pytest.mark.parametrize("home", ["", "home", "./x"])
def test_a_home_folder_is_an_absolute_path(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    with pytest.raises(K2Error, match="which is no absolute path"):
        home_folder()


@pytest.mark.parametrize(
    ("format", "old"),
    [
        ("jsonc", b'{\r\n\t"a": 1, // its comment\r\n\t// last\r\n}\r\n'),
        ("toml", b"a = 1 # its comment\r\n\r\n[b]\r\nc = 1\r\n"),
        ("yaml", b"a: 1 # its comment\r\nb:\r\n  - c: 1\r\n"),
    ],
)
def test_line_ends_of_windows_stay_in_every_format(
    tmp_path: Path, format: Format, old: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(old)
    planned = plan_change(ConfigChange(path, format, PATCH))
    assert planned.new.count(b"\n") == planned.new.count(b"\r\n") == planned.new.count(b"\r")
    removed = [line for line in planned.difference().splitlines()[2:] if line.startswith("-")]
    assert removed == []


def test_a_file_of_many_members_does_not_take_a_minute(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("{" + ",".join(f'"k{number}": 1' for number in range(14_000)) + "}")
    with mock.patch.object(Node, "member", autospec=True, side_effect=Node.member) as member:
        assert plan_change(_change(path)).changes
    assert member.call_count < 100  # each goes through all members


def test_a_copy_that_does_not_fit_the_disk_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"a": "' + "x" * 100_000 + '"}')
    planned = plan_change(_change(path))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(K2Error, match="cannot be written"):
            write_change(planned)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [each.name for each in tmp_path.iterdir()] == ["settings.json"]
    assert path.read_bytes() == planned.old


def test_the_difference_hides_keys(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(
        '{\n "apiKey": "sk-0123456789abcdef",\n "tokenSource": "manual", "max_tokens": 131072,\n'
        ' "Authorization": "Bearer sk-fedcba9876543210", "password": "several words of it"\n}'
    )
    change = ConfigChange(path, "json", {"key": "short", "note": "it is k2-secret", "n": 1})
    shown = plan_change(change).difference("k2-secret")
    assert "sk-0123456789abcdef" not in shown
    assert "k2-secret" not in shown
    assert "fedcba" not in shown
    assert '"password": "(hidden)"' in shown
    assert '"apiKey": "(hidden)"' in shown
    assert '"tokenSource": "manual"' in shown
    assert '"max_tokens": 131072' in shown
    assert "No newline at end of file" in shown
