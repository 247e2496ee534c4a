"""Read the status of a run once, for ``k2 ps``; None if it does not answer at once.

``k2 ps`` asks every live run, so this uses the standard library, which is imported faster than the
HTTP client of the other commands, and it does not wait long.
"""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from k2cli.client.status_document import status_document
from k2cli.files import decode_json
from k2cli.units import MIB

TIMEOUT_SECONDS = 1.0
_MAX_BYTES = 4 * MIB


def read_status(
    url: str, api_key: str | None, certificate: Path | None = None
) -> dict[str, Any] | None:
    """Return the document of a run's status; None if it cannot be had within a second.

    Args:
        url: of the run's API, without ``/v1``.
        api_key: the run's key, if it has one.
        certificate: file with the certificate of the run's API, if it has one.
    """
    address = urlsplit(url)
    if address.hostname is None:
        return None
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=TIMEOUT_SECONDS)
    if address.scheme == "https":
        if certificate is None:
            return None
        from k2cli.client.certificate import trusting  # ssl is slow to import

        connection = http.client.HTTPSConnection(
            address.hostname, address.port, timeout=TIMEOUT_SECONDS, context=trusting(certificate)
        )
    try:
        connection.request("GET", "/v1/status", headers=headers)
        answer = connection.getresponse()
        data = answer.read(_MAX_BYTES)
        if answer.status != 200:
            return None
        document: dict[str, Any] = decode_json(data, type=dict[str, Any])
        status_document(document)
    except (OSError, ValueError, http.client.HTTPException, msgspec.MsgspecError):
        return None
    finally:
        connection.close()
    return document
