"""The files of a certificate: what is refused before a run is started, and renewal."""

from __future__ import annotations

import os
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from k2cli.access import tls_files
from k2cli.access.tls_files import ServerTls, check_tls_files, covers, expiry_date
from k2cli.errors import K2Error
from tests.support.as_macos import on_macos
from tests.support.certificates import issue


def _problem(certificate: Path, key: Path) -> tuple[str, str]:
    report = check_tls_files(str(certificate), str(key))
    return report.problem, report.hint


def test_a_good_pair_is_described(tmp_path: Path) -> None:
    files = issue(tmp_path, "studio.local", "192.0.2.7")
    report = check_tls_files(str(files.certificate), str(files.key))
    assert report.problem == ""
    assert set(report.names) == {"studio.local", "192.0.2.7"}
    assert expiry_date(report) > f"{datetime.now(UTC):%Y-%m-%d}"
    # certbot's files are links, and Debian's keys are readable by a group.
    linked = tmp_path / "live"
    linked.symlink_to(files.key)
    files.key.chmod(0o640)
    assert _problem(files.certificate, linked) == ("", "")


def test_what_is_refused_and_why(tmp_path: Path) -> None:
    files = issue(tmp_path, "studio.local")
    other = issue(tmp_path / "other", "studio.local")
    old = issue(tmp_path / "old", "studio.local", expires=datetime.now(UTC) - timedelta(days=1))
    early = issue(tmp_path / "new", "studio.local", begins=datetime.now(UTC) + timedelta(days=2))
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", files.key, "-aes256", "-passout", "pass:x", "-out", locked],
        check=True,
    )
    locked.chmod(0o600)
    der = tmp_path / "certificate.der"
    der.write_bytes(ssl.PEM_cert_to_DER_cert(files.own_certificate))
    empty = tmp_path / "empty.pem"
    empty.touch(0o600)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for certificate, key, words in (
        (files.certificate, other.key, "is not that of the certificate"),
        (old.certificate, old.key, "certificate has expired"),
        (early.certificate, early.key, "certificate is not yet valid"),
        (files.certificate, locked, "is protected by a password"),
        (der, files.key, "has no certificate in the PEM format"),
        (files.certificate, empty, "cannot be used"),
        (tmp_path / "gone", files.key, "No such file"),
        (files.certificate, tmp_path / "gone", "No such file"),
        (pipe, files.key, "not a regular file"),
        (files.certificate, pipe, "is not a file"),
    ):
        problem, _ = _problem(certificate, key)
        assert words in problem, (certificate, key)
    for mode in (0o644, 0o660):
        files.key.chmod(mode)
        problem, hint = _problem(files.certificate, files.key)
        assert f"its mode is {mode:04o}" in problem
        subprocess.run(hint, shell=True, check=True)
        assert _problem(files.certificate, files.key)[0] == ""


def test_the_hint_for_a_password_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = issue(tmp_path, "studio.local")
    key = tmp_path / "with password.pem"
    command = ["openssl", "pkey", "-in", files.key, "-aes256", "-passout", "pass:x", "-out", key]
    subprocess.run(command, check=True)
    key.chmod(0o600)
    _, hint = _problem(files.certificate, key)
    command_line = hint.partition(": ")[2].replace("openssl pkey", "openssl pkey -passin pass:x")
    monkeypatch.chdir(tmp_path)
    subprocess.run(command_line, shell=True, check=True)
    assert _problem(files.certificate, tmp_path / "key.pem") == ("", "")


def test_renewed_files_are_taken_and_bad_ones_are_not(tmp_path: Path) -> None:
    files = issue(tmp_path, "studio.local")
    tls = ServerTls(str(files.certificate), str(files.key))
    first, chain = tls.context, tls.chain
    assert not tls.renew()
    later = issue(tmp_path / "later", "studio.local")
    # Whoever renews them replaces one after the other.
    later.certificate.replace(files.certificate)
    with pytest.raises(K2Error, match="is not that of the certificate"):
        tls.renew()
    assert not tls.renew()
    assert (tls.context, tls.chain) == (first, chain)
    later.key.replace(files.key)
    assert tls.renew()
    assert tls.context is not first
    assert tls.chain != chain


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("studio.local", True),
        ("STUDIO.local", True),
        ("a.example", True),
        ("a.b.example", False),
        ("example", False),
        ("[fe80::1]", True),
        ("other", False),
    ],
)
def test_which_hosts_a_certificate_is_for(host: str, expected: bool) -> None:
    assert covers(("studio.local", "*.example", "fe80::1"), host) is expected


def test_the_chain_has_nothing_but_certificates(tmp_path: Path) -> None:
    files = issue(tmp_path, "studio.local")
    both = tmp_path / "both.pem"
    both.write_bytes(files.key.read_bytes() + files.certificate.read_bytes())
    both.chmod(0o600)
    tls = ServerTls(str(both), str(both))
    assert "PRIVATE" not in tls.chain
    assert tls.chain.count("BEGIN CERTIFICATE") == 1


def test_a_key_for_the_group_of_all_users_of_a_mac_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = issue(tmp_path, "studio.local")
    files.key.chmod(0o640)
    monkeypatch.setattr(tls_files, "_STAFF", files.key.stat().st_gid)
    with on_macos():
        problem, hint = _problem(files.certificate, files.key)
        assert "its mode is 0640" in problem
        subprocess.run(hint, shell=True, check=True)
        assert _problem(files.certificate, files.key) == ("", "")
