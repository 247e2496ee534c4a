"""TLS of a server: trust in the one certificate that a run has reported, and failures of others."""

from __future__ import annotations

import ssl
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.units import MIB

_OTHER_NAME = 62
"""OpenSSL's ``X509_V_ERR_HOSTNAME_MISMATCH``."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
"""OpenSSL's reasons, by version, for an answer that is none of TLS."""
_PEM_END = "-----END CERTIFICATE-----"


def trusting(certificate: Path) -> ssl.SSLContext:
    """Return a context that accepts this certificate alone, also under another name.

    Raises:
        K2Error: if the file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        pem = read_regular(certificate, MIB).decode("ascii")
        # The first is the server's own; trusting the others would mean to trust their issuers.
        own = pem[: pem.index(_PEM_END) + len(_PEM_END)]
        context.load_verify_locations(cadata=own)
    except (OSError, ValueError) as error:
        raise K2Error(f"the certificate in {certificate} cannot be used: {error}") from error
    return context


def tls_failure(error: BaseException, base: str) -> tuple[str, str] | None:
    """Return the message and the hint for a connection that failed because of TLS, or None.

    Args:
        error: what the HTTP client raised.
        base: the address of the server.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message.rstrip(".")
        message = f"the certificate of {base} is not accepted: {reason}"
        if cause.verify_code == _OTHER_NAME:
            return message, "k2 chat --url https://NAME:PORT, with a name of the certificate"
        return message, f"SSL_CERT_FILE=ca.pem k2 chat --url {base}"
    if cause is not None and cause.reason in _NO_TLS:
        return f"{base} does not speak TLS", f"k2 chat --url {base.replace('https:', 'http:', 1)}"
    return None
