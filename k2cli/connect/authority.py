"""Choose the file of certificates by which other programs are to trust a run with TLS."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from pathlib import Path

from k2cli.files import read_regular
from k2cli.units import MIB

_VARIABLES = ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
_LIMIT_BYTES = 16 * MIB
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)


def authority_of(certificate: Path | None, environment: Mapping[str, str]) -> Path | None:
    """Return the file to name to an agent; None if k2 knows of none.

    Args:
        certificate: that of a run of this machine; None for a server that k2 reached by the
            authorities of the system or of the environment.
        environment: the user's; a file that it names is preferred if it has the certificate.
    """
    named = [Path(environment[name]).absolute() for name in _VARIABLES if environment.get(name)]
    if certificate is None:
        return named[0] if named else None
    own = _certificates(certificate)[:1]
    for path in named:
        if own and own[0] in _certificates(path):
            return path
    if _vouches_for_itself(certificate):
        return certificate
    return named[0] if named else None


def _vouches_for_itself(certificate: Path) -> bool:
    """True for certificates such as those of ``openssl req -x509``.

    k2's own client trusts any certificate of a run; other programs want that of its authority.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=str(certificate))
    except (OSError, ValueError):
        return False
    # Those that may not issue certificates are left out of the list.
    return any(each.get("issuer") == each.get("subject") for each in context.get_ca_certs())


def _certificates(path: Path) -> list[bytes]:
    """Return the certificates of a file of PEM, without space; none if it cannot be read."""
    try:
        data = read_regular(path, _LIMIT_BYTES, follow_links=True)
    except OSError:
        return []
    return [b"".join(found.split()) for found in _CERTIFICATE.findall(data)]
