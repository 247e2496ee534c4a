"""Certificates for tests, issued by an authority of their own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True)
class Files:
    """A certificate with its key, and the certificate of the authority that issued it."""

    certificate: Path
    key: Path
    authority: Path

    @property
    def own_certificate(self) -> str:
        return self.certificate.read_text()


def issue(
    folder: Path, *names: str, expires: datetime | None = None, begins: datetime | None = None
) -> Files:
    """Write the files of a new certificate for these names into a folder."""
    folder.mkdir(exist_ok=True)
    authority = trustme.CA()
    made = authority.issue_cert(*names, not_after=expires, not_before=begins)
    files = Files(folder / "certificate.pem", folder / "key.pem", folder / "authority.pem")
    made.cert_chain_pems[0].write_to_path(files.certificate)
    files.key.touch(0o600)
    made.private_key_pem.write_to_path(files.key)
    authority.cert_pem.write_to_path(files.authority)
    return files
