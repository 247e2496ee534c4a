"""The requests of a server: those in progress, and the totals of those that have ended."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from k2cli.server.dialects.error_responses import error_code_of, request_id_of
from k2cli.server.metrics.access_log import access_line
from k2cli.server.metrics.request_record import RequestRecord, attach, dialect_of
from k2cli.server.metrics.totals import GENERATING, Dialect, Totals

_ID_BYTES = 4


class Activity:
    """Requests in progress by their ids, oldest first, and totals.

    Args:
        log: receives a line about each finished request.
    """

    def __init__(self, log: Callable[[str], None] = lambda line: None) -> None:
        self.totals = Totals()
        self.live: dict[str, RequestRecord] = {}
        self.began = time.time()
        """Seconds since the epoch; ``began_at`` is the same of the monotonic clock."""
        self.began_at = time.monotonic()
        self._log = log

    def begin(self, dialect: Dialect, request_id: str) -> RequestRecord:
        """Record a request whose header has come."""
        record = RequestRecord(secrets.token_hex(_ID_BYTES), dialect, request_id, self.totals)
        if dialect != "other":
            self.live[record.id] = record
        return record

    def end(self, record: RequestRecord, status: int, error_code: str = "") -> None:
        """Count and log a request that is over.

        Args:
            record: the request.
            status: of its response; 499 if there is none.
            error_code: of the error that the response is, or empty.
        """
        self.live.pop(record.id, None)
        result = record.result(status)
        if record.dialect == "other" and result in ("completed", "client_gone"):
            return  # lists of models, probes and the reading of metrics itself
        record.own_totals.requests[record.dialect, result] += 1
        now = time.monotonic()
        if result == "completed" and record.dialect in GENERATING:
            record.own_totals.request_seconds.observe(now - record.began)
        self._log(access_line(record, status, result, error_code, now))


class RecordRequests:
    """ASGI middleware that records every request, and tells the client the request's id."""

    def __init__(self, app: ASGIApp, activity: Activity) -> None:
        self._app = app
        self._activity = activity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        record = self._activity.begin(dialect_of(scope), request_id)
        attach(record, scope)
        status = 499

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_recorded)
        except BaseException as error:
            code = "internal_error" if isinstance(error, Exception) else "stopping"
            record.failure = record.failure or (500, code)
            raise
        finally:
            self._activity.end(record, status, error_code_of(scope))
