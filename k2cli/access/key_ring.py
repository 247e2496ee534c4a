"""The keys that a run accepts at the moment, and the clients that use them."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from k2cli.access.keys import digest_of
from k2cli.access.limits import Usage
from k2cli.protocol import KeyLimits, NamedKey

Revoked = Callable[[], None]
"""Ends a request whose key was revoked."""


class Client:
    """Somebody who may use a run: with a named key, with the run's own key, or without any.

    Args:
        key: the named key; None for the other two, who have no limits.
    """

    def __init__(self, key: NamedKey | None = None) -> None:
        self.key = key
        self.usage = Usage(key.limits if key else KeyLimits())
        self.is_revoked = False
        self._requests: dict[object, Revoked] = {}

    @property
    def name(self) -> str:
        """Name of the key, for people; "" for the run's own key and a run without one."""
        return self.key.name if self.key else ""

    @property
    def owner(self) -> str:
        """The opaque id by which the engine tells clients apart, "" like ``name``."""
        return self.key.key_id if self.key else ""

    @property
    def may_monitor(self) -> bool:
        """True if the client may see what others do with the run."""
        return self.key is None or self.key.monitors

    def watch(self, request: object, revoked: Revoked) -> None:
        """Have ``revoked`` called if the key is revoked before ``forget``."""
        self._requests[request] = revoked

    def forget(self, request: object) -> None:
        """Take back ``watch``. Idempotent."""
        self._requests.pop(request, None)

    def revoke(self) -> None:
        """End the requests of the client."""
        self.is_revoked = True
        requests, self._requests = self._requests, {}
        for end in requests.values():
            end()


class Refused(Exception):
    """Error for a key that is none of the run's, or has expired; the message is for the client."""


class KeyRing:
    """The keys of a run. Use it from one event loop only.

    Args:
        run_key: the run's own key; None if everybody may use it.
        keys: named keys, accepted beside the run's own.
    """

    def __init__(self, run_key: str | None = None, keys: Iterable[NamedKey] = ()) -> None:
        self.required = run_key is not None
        """True if a request needs a key."""
        self.owner = Client()
        """The client of the run's own key, or of a run without one."""
        self._run_digest = digest_of(run_key.encode()) if run_key is not None else None
        self._clients: dict[str, Client] = {}
        self.replace(keys)

    @property
    def clients(self) -> list[Client]:
        """The clients of the named keys."""
        return list(self._clients.values())

    def replace(self, keys: Iterable[NamedKey]) -> None:
        """Accept these named keys from now on. Requests under one that is gone are ended."""
        before, self._clients = self._clients, {}
        for key in keys:
            known = before.get(key.key_id)
            if known is None or known.key is None or known.key.digest != key.digest:
                self._clients[key.key_id] = Client(key)
                continue
            known.key = key
            known.usage.set_limits(key.limits)
            self._clients[key.key_id] = before.pop(key.key_id)
        for client in before.values():
            client.revoke()

    def identify(self, given: Sequence[bytes]) -> Client:
        """Return the client of the first key that is right.

        Every given key is compared with all keys of the run, by their digests and each in constant
        time, so that the time tells nothing about them.

        Raises:
            Refused: if none is right, or the one that is has expired.
        """
        found = [client for key in given if (client := self._client_of(key)) is not None]
        if not found:
            raise Refused("wrong API key: it is none of those that this run accepts")
        client = found[0]
        if client.key and client.key.expires is not None and time.time() >= client.key.expires:
            when = datetime.fromtimestamp(client.key.expires, UTC)
            raise Refused(f"this API key expired on {when:%Y-%m-%d %H:%M} UTC")
        return client

    def _client_of(self, key: bytes) -> Client | None:
        digest = digest_of(key)
        found = None
        if self._run_digest is not None and hmac.compare_digest(digest, self._run_digest):
            found = self.owner
        for client in self._clients.values():
            # No early end: the time must not depend on which key it is.
            if client.key and hmac.compare_digest(digest, client.key.digest) and found is None:
                found = client
        return found
