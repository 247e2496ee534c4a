"""Proxies and authorities that the environment names: refuse those that cannot be used, by name."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import urllib.parse
import urllib.request
from collections.abc import Iterator

from k2cli.errors import K2Error

_VARIABLES = ("all_proxy", "http_proxy", "https_proxy")  # as httpx2 reads them
_AUTHORITIES = "SSL_CERT_FILE"
_SCHEMES = "http, https, socks5 and socks5h"
_SECRET = re.compile(r"//.*@")  # a password may hold / and @


@contextlib.contextmanager
def proxy_errors() -> Iterator[None]:
    """Turn errors about a proxy, or about authorities for TLS, into a ``K2Error``.

    They come as a client is made, and as it connects.
    """
    import httpx2
    import socksio

    try:
        yield
    except (ValueError, ImportError, httpx2.InvalidURL) as error:
        refusal = unusable_proxy()
        if refusal is None:
            raise
        raise refusal from error
    except socksio.SOCKSError as error:
        raise K2Error(
            f"the SOCKS proxy that the environment names does not answer as one: {error}",
            "env | grep -i _proxy",
        ) from error
    except OSError as error:
        refusal = unusable_authorities()
        if refusal is None:
            raise
        raise refusal from error


def unusable_authorities() -> K2Error | None:
    """Return the error for a file of ``SSL_CERT_FILE`` that cannot be used; None if it can be."""
    value = os.environ.get(_AUTHORITIES)
    if not value:
        return None
    try:
        ssl.create_default_context(cafile=value)
    except ssl.SSLError:
        reason = "it has no certificate in PEM"
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        return None
    return K2Error(f"{_AUTHORITIES} '{value}' cannot be used: {reason}", f"unset {_AUTHORITIES}")


def unusable_proxy() -> K2Error | None:
    """Return the error for the first variable whose proxy cannot be used; None if there is none."""
    import httpx2

    for name in sorted(os.environ, key=str.lower):
        value = os.environ[name]
        if name.lower() not in _VARIABLES or not value:
            continue
        try:
            httpx2.HTTPTransport(proxy=value if "://" in value else f"http://{value}").close()
        except (ValueError, ImportError, httpx2.InvalidURL):
            return _refusal(name, value)
    return None


def proxy_for(url: str) -> tuple[str, str] | None:
    """Return the variable and the value, without a password, of the proxy used for ``url``.

    None if the connection is direct, or if the proxy is the system's and no variable names it.
    """
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    for wanted in (f"{parts.scheme}_proxy", "all_proxy"):
        # The lower-case name counts if both are set.
        for name in sorted(os.environ, reverse=True):
            if name.lower() == wanted and os.environ[name]:
                return name, _SECRET.sub("//…@", os.environ[name])
    return None


def unreachable(url: str, hint: str) -> tuple[str, str]:
    """Return what to add to "cannot fetch X", and a hint, for a connection that failed.

    Args:
        url: what was asked for.
        hint: what to do if no proxy was used.
    """
    proxy = proxy_for(url)
    if proxy is None:
        return "", hint
    name, shown = proxy
    return f" through the proxy '{shown}' of {name}", f"unset {name}, or name a proxy that answers"


def _refusal(name: str, value: str) -> K2Error:
    shown = _SECRET.sub("//…@", value)  # a password of the proxy stays out of the message
    scheme, _, rest = shown.strip().partition("://")
    if scheme.lower() in ("socks", "socks4", "socks4a") and rest:
        repaired = f"socks5://{rest}"
    else:
        repaired = "http://HOST:PORT"
    return K2Error(
        f"{name} '{shown}' is not a proxy that k2 can use: it knows {_SCHEMES}",
        f"export {name}={repaired}, or unset {name}",
    )
