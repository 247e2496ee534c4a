"""Decide if the certificate of a run can be named to other programs as one to trust."""

from __future__ import annotations

import ssl
from pathlib import Path


def usable_authority(certificate: Path) -> bool:
    """True if the certificate vouches for itself, as those that ``openssl req -x509`` makes.

    k2's own client trusts any certificate of a run; other programs want that of its authority.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=str(certificate))
    except (OSError, ValueError):
        return False
    # Those that may not issue certificates are left out of the list.
    return any(each.get("issuer") == each.get("subject") for each in context.get_ca_certs())
