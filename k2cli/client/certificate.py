"""Trust in the one certificate that a run of this machine has reported."""

from __future__ import annotations

import ssl
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.units import MIB

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
