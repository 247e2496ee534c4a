"""Ranges of files over HTTP, from a server that is not trusted.

What it says about sizes, ranges and redirects is checked, and what it sends is bounded by what was
asked for. Credentials go to the origin of the first address and to no other.
"""

from __future__ import annotations

import contextlib
import email.utils
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from k2cli.errors import K2Error
from k2cli.models.sources.byte_source import Answer, PassingError
from k2cli.models.sources.expected_files import ExpectedFile, expected_file
from k2cli.proxies import proxy_errors
from k2cli.units import one_line

_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""Failures of a server that another attempt may not have."""
_EXPIRED = (400, 401, 403, 404, 410)
"""Answers of a store to an address that was valid once, such as a signed one that has expired."""

_CONNECT_SECONDS = 10.0
_READ_BYTES = 2**18
_NEAR_SECONDS = 0.002
_NEAR_BUFFER_BYTES = 2**16  # Linux reserves twice as much
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_CREDENTIALS = frozenset({"authorization", "cookie", "proxy-authorization"})


@dataclass(frozen=True, slots=True)
class HttpService:
    """A server of files: addresses, headers of requests, and its errors.

    ``refusal`` makes the error for an answer that is neither success nor redirect nor passing.
    """

    name: str
    url_of: Callable[[ExpectedFile], str]
    headers: Mapping[str, str]
    refusal: Callable[[Any, ExpectedFile], K2Error]


class HttpSource:
    """Files of one revision on a server; see ``ByteSource``."""

    def __init__(self, service: HttpService, streams: int, read_timeout_seconds: float) -> None:
        """Make the client; nothing is sent yet.

        Raises:
            K2Error: if the environment names a proxy that cannot be used.
        """
        import httpx2

        _read_large_pieces()
        self._service = service
        self._stores: dict[str, str] = {}
        self._lock = threading.Lock()
        with proxy_errors():
            self._client = httpx2.Client(
                follow_redirects=False,
                timeout=httpx2.Timeout(read_timeout_seconds, connect=_CONNECT_SECONDS),
                limits=httpx2.Limits(max_connections=streams + 2),
            )

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    @contextlib.contextmanager
    def open(self, file: ExpectedFile, first: int, past_last: int) -> Iterator[Answer]:
        """Ask for a range; see ``ByteSource``."""
        import httpx2

        try:
            with proxy_errors(), self._followed(file, first, past_last) as response:
                yield self._answer(response, file, first, past_last)
        except httpx2.TimeoutException as error:
            raise PassingError("the server does not answer") from error
        except httpx2.ProxyError as error:
            raise PassingError(f"the proxy fails: {_reason(error)}") from error
        except (httpx2.TransportError, httpx2.StreamError) as error:
            raise PassingError(_reason(error)) from error
        except httpx2.InvalidURL as error:
            raise K2Error(
                f"{self._service.name} redirects {file.name} to an address that is none"
            ) from error

    @contextlib.contextmanager
    def _followed(self, file: ExpectedFile, first: int, past_last: int) -> Iterator[Any]:
        """Yield the answer at the end of the redirects; remember where the last one led."""
        start = self._service.url_of(file)
        with self._lock:
            url = self._stores.get(file.name, start)
        for _ in range(_MAX_REDIRECTS + 1):
            headers = self._headers(start, url, first, past_last)
            extensions = {"trace": _Connecting()}
            with self._client.stream(
                "GET", url, headers=headers, extensions=extensions
            ) as response:
                status = response.status_code
                if status in (200, 206):
                    with self._lock:
                        self._stores[file.name] = url
                    yield response
                    return
                self._check(response, file, first_hop=url == start)
                if status not in _REDIRECTS:
                    with self._lock:
                        self._stores.pop(file.name, None)
                    self._raise_for(response, file, of_store=url != start)
                location = response.headers.get("location", "")
                target = _redirected(self._service.name, file, url, location)
            url = target
        raise K2Error(f"{self._service.name} redirects {file.name} without end", "try again later")

    def _headers(self, start: str, url: str, first: int, past_last: int) -> dict[str, str]:
        same = _origin(start) == _origin(url)
        kept = {
            name: value
            for name, value in self._service.headers.items()
            if same or name.lower() not in _CREDENTIALS
        }
        return kept | {"range": f"bytes={first}-{past_last - 1}", "accept-encoding": "identity"}

    def _raise_for(self, response: Any, file: ExpectedFile, *, of_store: bool) -> None:
        status = response.status_code
        if status in PASSING_STATUSES:
            raise PassingError(f"HTTP {status}", retry_after(response.headers))
        if of_store and status in _EXPIRED:
            raise PassingError(f"HTTP {status} from the store that it redirects to")
        if status == 416:
            raise K2Error(
                f"{self._service.name} has less of {file.name} than the {file.nbytes} bytes that "
                "its own list says",
                "try again later, or another mirror",
            )
        raise self._service.refusal(response, file)

    def _check(self, response: Any, file: ExpectedFile, *, first_hop: bool) -> None:
        """Check the hash in an answer of the first server, where it is one: ``ETag``.

        Raises:
            PassingError: if it is that of other content; a mirror may be behind.
        """
        if not first_hop:
            return
        tag = response.headers.get("x-linked-etag") or response.headers.get("etag") or ""
        stated = expected_file(file.name, file.nbytes, tag.removeprefix("W/").strip('"'))
        if stated is None or (stated.sha256 is None) != (file.sha256 is None):
            return
        if stated.blob_name != file.blob_name:
            raise PassingError(f"the ETag is that of other content, {stated.blob_name[:12]}")

    def _answer(self, response: Any, file: ExpectedFile, first: int, past_last: int) -> Answer:
        """Check the start of an answer against what was asked for and what is known."""
        self._check(response, file, first_hop=str(response.url) == self._service.url_of(file))
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise PassingError("the answer is compressed, although that was not asked for")
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if match is None or int(match[1]) != first:
                raise PassingError("the answer is another range than the one asked for")
            self._check_size(file, match[3])
            return Answer(first, _bounded(response.iter_raw(), past_last - first))
        self._check_size(file, response.headers.get("content-length", "*"))
        chunks = _skipping(response.iter_raw(), first)
        return Answer(first, _bounded(chunks, file.nbytes - first), ranged=False)

    def _check_size(self, file: ExpectedFile, stated: str) -> None:
        if stated not in ("*", str(file.nbytes)):
            raise PassingError(
                f"it says that the file has {one_line(stated)[:20]} bytes, not {file.nbytes}"
            )


class _Connecting:
    """Limits what the system receives ahead of k2 from a server that is near.

    Bytes that the system has received but k2 has not read are lost when k2 is killed. A near server
    needs no large window to send at full speed; for a far one the system's own choice stays.
    """

    def __init__(self) -> None:
        self._begun = 0.0

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.started":
            self._begun = time.monotonic()
            return
        is_near = time.monotonic() - self._begun < _NEAR_SECONDS
        if event == "connection.connect_tcp.complete" and is_near:
            connection = info["return_value"].get_extra_info("socket")
            with contextlib.suppress(AttributeError, OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NEAR_BUFFER_BYTES)


def _read_large_pieces() -> None:
    """Let the library read 256 KiB at a time from its sockets, instead of 64.

    That halves the time of the processor for a large body. It has no setting for it.
    """
    import httpcore2

    if hasattr(httpcore2.HTTP11Connection, "READ_NUM_BYTES"):
        httpcore2.HTTP11Connection.READ_NUM_BYTES = _READ_BYTES


def _bounded(chunks: Iterator[bytes], most_bytes: int) -> Iterator[bytes]:
    """Pass on at most that many bytes, whatever the server sends."""
    for chunk in chunks:
        if len(chunk) >= most_bytes:
            yield chunk[:most_bytes]
            return
        most_bytes -= len(chunk)
        yield chunk


def _skipping(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Leave out the first ``count`` bytes; empty chunks show that the server still sends."""
    for chunk in chunks:
        skipped = min(count, len(chunk))
        count -= skipped
        yield chunk[skipped:]


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def _redirected(service: str, file: ExpectedFile, url: str, location: str) -> str:
    """Return the address that a redirect leads to.

    Raises:
        K2Error: if it is none, or gives up the encryption.
    """
    try:
        target = urljoin(url, location)
        scheme, host, _ = _origin(target)
    except ValueError:
        target, scheme, host = "", "", ""
    if scheme not in ("http", "https") or not host:
        raise K2Error(f"{service} redirects {file.name} to an address that is none")
    if scheme == "http" and url.startswith("https:"):
        raise K2Error(
            f"{service} redirects {file.name} to {one_line(host)} without encryption",
            "check HF_ENDPOINT and the proxy",
        )
    return target


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Read ``Retry-After``, seconds or a date; None if there is none that can be read."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _reason(error: Exception) -> str:
    """Describe an error without addresses: those of stores have signatures in them."""
    text = re.sub(r"https?://\S+", "…", str(error)).strip()
    return one_line(text.splitlines()[0])[:200] if text else type(error).__name__
