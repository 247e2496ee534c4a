"""The certificate and private key of an API: read, checked, and made into a TLS context.

The launcher has them checked on the leader's node, by the agent, before anything is started. The
leader's guard reads them again, then and whenever they change. The files are often links, such as
those of certbot, so links are followed.
"""

from __future__ import annotations

import os
import re
import shlex
import ssl
import stat
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from k2cli.errors import K2Error
from k2cli.files import read_regular

_LIMIT_BYTES = 1_000_000
_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----\s.+?\s-----END CERTIFICATE-----", re.DOTALL
)
_MAX_NAMES = 20
_STAFF = 20  # the group of all users of a Mac
WARN_DAYS = 14


class TlsReport(msgspec.Struct, frozen=True):
    """Result of a check of the files: a problem with its hint, or facts of the certificate.

    ``names`` are those that the certificate is for, ``expires`` is in seconds since the epoch.
    """

    problem: str = ""
    hint: str = ""
    names: tuple[str, ...] = ()
    expires: float = 0.0


def check_tls_files(certificate: str, key: str) -> TlsReport:
    """Check the files on this machine, for the process that starts the run."""
    try:
        return load_tls(certificate, key)[1]
    except K2Error as error:
        return TlsReport(error.message, error.hint or "")


def load_tls(certificate: str, key: str) -> tuple[ssl.SSLContext, TlsReport]:
    """Make the server's context of a certificate and its private key.

    Raises:
        K2Error: if a file cannot be read, others can read the key, the key has a password or
            belongs to another certificate, or the certificate is not valid now.
    """
    chain = read_certificate(certificate)
    _check_key_access(Path(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password function, OpenSSL would ask for the password on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: _refuse_password(key))
    except ssl.SSLError as error:
        raise _pair_error(error, certificate, key) from error
    except OSError as error:
        raise K2Error(
            f"the TLS key in '{key}' cannot be read: {error.strerror or error}"
        ) from error
    return context, _report(context, chain, certificate)


def read_certificate(path: str) -> str:
    """Return the certificates of a PEM file, without anything else that it may have.

    Raises:
        K2Error: if there are none.
    """
    try:
        data = read_regular(Path(path), _LIMIT_BYTES, follow_links=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise K2Error(f"the TLS certificate in '{path}' cannot be read: {reason}") from error
    found = _CERTIFICATE.findall(data)
    if not found:
        raise K2Error(
            f"'{path}' has no certificate in the PEM format",
            f"for one in the DER format: openssl x509 -inform der -in {shlex.quote(path)} "
            "-out cert.pem",
        )
    return b"\n".join(found).decode("ascii", errors="replace") + "\n"


def _check_key_access(path: Path) -> None:
    """Check who can read the private key. Its group may, as in Debian's ``/etc/ssl/private``.

    On a Mac files are of the group ``staff`` by default, to which all local users belong.

    Raises:
        K2Error: if everybody can read it, or somebody else can replace its content.
    """
    try:
        found = path.stat()
    except OSError as error:
        reason = error.strerror or str(error)
        raise K2Error(f"the TLS key in '{path}' cannot be read: {reason}") from error
    quoted = shlex.quote(str(path))
    if not stat.S_ISREG(found.st_mode):
        raise K2Error(f"the TLS key '{path}' is not a file")
    if found.st_uid not in (0, os.geteuid()):
        raise K2Error(
            f"the TLS key '{path}' belongs to another user", f"sudo chown {os.geteuid()} {quoted}"
        )
    everybody = sys.platform == "darwin" and found.st_gid == _STAFF
    if found.st_mode & (0o077 if everybody else 0o027):
        raise K2Error(
            f"others can use the TLS key '{path}': its mode is {stat.S_IMODE(found.st_mode):04o}",
            f"chmod 600 {quoted}",
        )


def _refuse_password(key: str) -> str:
    quoted = shlex.quote(key)
    raise K2Error(
        f"the TLS key in '{key}' is protected by a password, and a run starts without anybody "
        "to type it",
        f"store it without one, readable by you alone: (umask 077; openssl pkey -in {quoted} "
        "-out key.pem)",
    )


def _pair_error(error: ssl.SSLError, certificate: str, key: str) -> K2Error:
    match error.reason:
        case "KEY_VALUES_MISMATCH" | "KEY_TYPE_MISMATCH" | "NO_CERTIFICATE_ASSIGNED":
            return K2Error(
                f"the TLS key in '{key}' is not that of the certificate in '{certificate}'",
                "give the key for which the certificate was issued; the server's own certificate "
                "must be the first in its file",
            )
        case "EE_KEY_TOO_SMALL" | "CA_MD_TOO_WEAK" | "CA_KEY_TOO_SMALL":
            return K2Error(f"the TLS certificate in '{certificate}' is too weak: {error.reason}")
    reason = (error.reason or "it is damaged").replace("_", " ").lower()
    return K2Error(
        f"the TLS certificate in '{certificate}' and the key in '{key}' cannot be used: {reason}",
        f"see if the key is one: openssl pkey -noout -in {shlex.quote(key)}",
    )


def _report(context: ssl.SSLContext, chain: str, path: str) -> TlsReport:
    """Describe the certificate as a client sees it, by a handshake in memory.

    Raises:
        K2Error: if it is not valid now, or not for a server.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # The certificate itself is what is trusted, so that only its own properties are checked.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=_CERTIFICATE.findall(chain.encode())[0].decode())
    try:
        shown = _handshake(client, context)
    except ssl.SSLCertVerificationError as error:
        raise K2Error(
            f"the TLS certificate in '{path}' cannot be used: {error.verify_message}",
            "renew it, or check the clock of the machine: date",
        ) from error
    except ssl.SSLError as error:
        raise K2Error(f"the TLS certificate in '{path}' cannot be used: {error.reason}") from error
    names = [str(name) for kind, name in shown.get("subjectAltName", ())][:_MAX_NAMES]
    return TlsReport(
        names=tuple(names), expires=float(ssl.cert_time_to_seconds(str(shown["notAfter"])))
    )


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, Any]:
    """Connect two contexts in memory, and return the server's certificate."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(10):
        done = []
        for side in (one, other):
            try:
                side.do_handshake()
                done.append(side)
            except ssl.SSLWantReadError:
                continue
        if len(done) == 2:
            break
    return one.getpeercert() or {}


class ServerTls:
    """The TLS context of a server, which follows its files: renewed ones are taken without a stop.

    Args:
        certificate, key: paths on this machine.

    Raises:
        K2Error: if the files cannot be used now.
    """

    def __init__(self, certificate: str, key: str) -> None:
        self._certificate = certificate
        self._key = key
        self._stamp = self._look()
        self.context, self.report = load_tls(certificate, key)
        self.chain = read_certificate(certificate)

    def renew(self) -> bool:
        """Read the files again if they have changed; return True if they had.

        Raises:
            K2Error: if the new ones cannot be used, once for each change. The old ones stay, and
                key that is replaced after its certificate is a change of its own.
        """
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        context, report = load_tls(self._certificate, self._key)
        self.chain = read_certificate(self._certificate)
        self.context, self.report = context, report
        return True

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(_stamp(path) for path in (self._certificate, self._key))


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode)


def covers(names: tuple[str, ...], host: str) -> bool:
    """Return True if a certificate for these names is one for a host, with one level of ``*``."""
    host = host.lower().strip("[]")
    rest = host.partition(".")[2]
    return any(
        name == host or (name.startswith("*.") and rest and name[2:] == rest)
        for name in (each.lower() for each in names)
    )


def expiry_date(report: TlsReport) -> str:
    """Return the day until which the certificate is valid, in UTC."""
    return f"{datetime.fromtimestamp(report.expires, UTC):%Y-%m-%d}"
