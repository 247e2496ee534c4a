"""Agents are given the file by which they can trust a run, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from k2cli.connect.authority import authority_of


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Certificates of an authority, of a server that it vouches for, and a system's list."""
    authority = trustme.CA()
    server = authority.issue_cert("studio-1")
    paths = {name: tmp_path / f"{name}.pem" for name in ("own", "server", "system", "both")}
    authority.cert_pem.write_to_path(str(paths["own"]))
    server.cert_chain_pems[0].write_to_path(str(paths["server"]))
    trustme.CA().cert_pem.write_to_path(str(paths["system"]))
    paths["both"].write_bytes(paths["system"].read_bytes() + b"\n" + paths["own"].read_bytes())
    return paths


def test_a_certificate_that_vouches_for_itself_is_its_own_authority(
    files: dict[str, Path],
) -> None:
    assert authority_of(files["own"], {}) == files["own"]
    assert authority_of(files["own"], {"SSL_CERT_FILE": str(files["system"])}) == files["own"]
    both = {"SSL_CERT_FILE": str(files["system"]), "NODE_EXTRA_CA_CERTS": str(files["both"])}
    assert authority_of(files["own"], both) == files["both"]


def test_a_certificate_of_an_authority_needs_the_users_word(files: dict[str, Path]) -> None:
    assert authority_of(files["server"], {}) is None
    assert authority_of(files["server"], {"SSL_CERT_FILE": str(files["own"])}) == files["own"]
    assert authority_of(None, {}) is None
    assert authority_of(None, {"NODE_EXTRA_CA_CERTS": "ca.pem"}) == Path("ca.pem").absolute()


def test_files_that_cannot_be_read_are_no_authorities(
    files: dict[str, Path], tmp_path: Path
) -> None:
    missing = {"SSL_CERT_FILE": str(tmp_path / "none"), "NODE_EXTRA_CA_CERTS": "/dev/zero"}
    assert authority_of(files["own"], missing) == files["own"]
    assert authority_of(tmp_path / "none", {}) is None
