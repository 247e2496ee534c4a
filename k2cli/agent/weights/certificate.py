"""A certificate for one transfer, made by ``openssl``, and the contexts of its two sides.

Nobody signs it: the sender compares its fingerprint with the one that came over SSH. The private
key is in a folder of this user alone for as long as OpenSSL reads it.
"""

from __future__ import annotations

import hashlib
import shutil
import ssl
import subprocess
import tempfile
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import read_regular

_SECONDS = 30.0
_LIMIT_BYTES = 100_000
_KINDS = (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"], ["-newkey", "rsa:2048"])
"""Kinds of keys, the faster first; not every LibreSSL makes the first."""


def make_server_context() -> tuple[ssl.SSLContext, str]:
    """Make a certificate; return the context that shows it, and its SHA-256 as hex.

    Raises:
        K2Error: if there is no ``openssl``, or it fails.
    """
    program = shutil.which("openssl", path="/usr/bin:/usr/local/bin:/opt/homebrew/bin:/bin")
    if program is None:
        raise K2Error("there is no openssl here, which makes the certificate")
    with tempfile.TemporaryDirectory(prefix="k2-certificate-") as base:
        key, certificate = Path(base) / "key.pem", Path(base) / "certificate.pem"
        fixed = ["-x509", "-nodes", "-days", "2", "-subj", "/CN=k2"]
        paths = ["-keyout", str(key), "-out", str(certificate)]
        for kind in _KINDS:
            if _runs([program, "req", *fixed, *kind, *paths]):
                break
        else:
            raise K2Error("openssl cannot make a certificate here")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(certificate, key)
            encoded = ssl.PEM_cert_to_DER_cert(
                read_regular(certificate, _LIMIT_BYTES).decode("ascii")
            )
        except (OSError, ValueError) as error:
            raise K2Error(f"the certificate of openssl cannot be used: {error}") from error
    return context, hashlib.sha256(encoded).hexdigest()


def make_client_context() -> ssl.SSLContext:
    """Return a context that accepts any certificate: the caller compares its fingerprint."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _runs(command: list[str]) -> bool:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
