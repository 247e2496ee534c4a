"""Client of an OpenAI-compatible HTTP API, used by ``k2 chat``, ``k2 bench`` and ``k2 top``.

The client works with other servers too; the extensions of k2's own server (progress, timings,
token ids in and out) are used if ``/v1/models`` names k2 as the owner. Failures become ``K2Error``
with the server's message and an exit code for the kind of failure.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from k2cli.client.answers import (
    Ended,
    Progress,
    StreamEvent,
    Timings,
    concerns_field,
    count,
    decoded,
    error_message,
    events,
    lines,
    no_openai_api,
    objects,
    read_timings,
)
from k2cli.client.certificate import tls_failure, trusting
from k2cli.client.status_document import StatusDocument, status_document
from k2cli.errors import ClusterError, K2Error, NotAuthorisedError, UsageError
from k2cli.proxies import proxy_errors, unreachable
from k2cli.units import MIB

CONNECT_SECONDS = 10.0
# k2's server sends something every 10 s; others may send nothing during a long prefill.
READ_SECONDS = 600.0
_STATUS_SECONDS = 10.0
_MAX_STATUS_BYTES = 4 * MIB
_MAX_ANSWER_BYTES = 64 * MIB
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_NO_MESSAGE = "HTTP status {}"
_K2_OWNER = "k2"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the server offers; ``context_length`` (tokens) is None if it does not say.

    ``tools`` and ``reasoning`` tell if the model calls tools and reasons, if the server says it.
    """

    name: str
    context_length: int | None = None
    is_k2: bool = False
    tools: bool | None = None
    reasoning: bool | None = None


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Options of a request; None leaves the value to the server."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    reasoning_effort: str | None = None

    def members(self) -> dict[str, Any]:
        """Return the JSON members of the options that are set."""
        values = asdict(self)
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion with its moments by the client's monotonic clock.

    ``first_token_at`` and ``last_token_at`` are the arrival times of the first and last token.
    ``token_times`` has those of all tokens, or is empty if the server does not count tokens.
    """

    started_at: float
    first_token_at: float
    last_token_at: float
    ended_at: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: Timings | None
    token_times: tuple[float, ...] = ()


def api_base(url: str) -> str:
    """Complete an address to the base of the API: add ``http://`` and ``/v1`` if missing.

    Raises:
        UsageError: if the text is not an HTTP address.
    """
    text = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise UsageError(f"'{url}' is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"'{url}' is not a URL", "write for example http://127.0.0.1:8080")
    path = parsed.path.rstrip("/")
    return str(parsed.copy_with(path=path if path.endswith("/v1") else f"{path}/v1"))


def _trust(certificate: Path | None, *, needed: bool) -> ssl.SSLContext | bool:
    """Return what the client trusts; reading all authorities takes 50 ms of the processor.

    Args:
        needed: False for plain HTTP without a proxy, which has no certificates.
    """
    if certificate is not None:
        return trusting(certificate)
    return httpx2.create_ssl_context() if needed else False


class ApiClient:
    """Client of one server. Close it, or use it as a context manager.

    Args:
        url: address of the server.
        api_key: sent with each request, if there is one.
        certificate: file with the server's certificate, which is then the only one to trust,
            whatever its names; None for the authorities that the system knows, or those of
            ``SSL_CERT_FILE``.
    """

    def __init__(
        self, url: str, api_key: str | None = None, certificate: Path | None = None
    ) -> None:
        self.base = api_base(url)
        headers = {b"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
        own_port = httpx2.URL(self.base).host in _LOOPBACK
        with proxy_errors():
            self._http = httpx2.Client(
                verify=_trust(certificate, needed=not (own_port and self.base.startswith("http:"))),
                headers=headers,
                timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
                # Proxies from the environment are not used for this machine's own ports.
                trust_env=not own_port,
                limits=httpx2.Limits(max_connections=None),
            )

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def models(self) -> list[ModelInfo]:
        """Return the models that the server offers.

        Raises:
            K2Error: if the server cannot be reached or refuses the request.
        """
        entries = self._ask("GET", "models", timeout=CONNECT_SECONDS).get("data", [])
        return [
            ModelInfo(
                name=str(entry.get("id", "")),
                # k2's name of the field, and vLLM's.
                context_length=count(entry.get("context_length", entry.get("max_model_len"))),
                is_k2=entry.get("owned_by") == _K2_OWNER,
                tools=_has_parser(entry, "tool_parser"),
                reasoning=_has_parser(entry, "reasoning_parser"),
            )
            for entry in objects(entries)
        ]

    def pick_model(self, name: str | None) -> ModelInfo:
        """Return the model of a name, or the first one if the name is None.

        Raises:
            K2Error: if the server has no such model.
        """
        offered = self.models()
        for model in offered:
            if name is None or model.name == name:
                return model
        names = ", ".join(model.name for model in offered) or "no model"
        raise K2Error(f"{self.base} does not serve '{name}'; it serves {names}")

    def status(self) -> StatusDocument:
        """Return the status of the run (``GET /v1/status``, k2 only).

        Raises:
            K2Error: if the server cannot be reached, refuses, or has no status.
        """
        url = f"{self.base}/status"
        with (
            self._failures(),
            self._http.stream("GET", url, timeout=_STATUS_SECONDS) as response,
        ):
            if response.status_code == 404:
                raise K2Error(f"{self.base} has no status: it is no server of k2 launch", "k2 ps")
            if not response.is_success:
                raise self._refusal(response)
            body = self._body(response, _MAX_STATUS_BYTES, _STATUS_SECONDS)
        try:
            return status_document(decoded(body, self.base))
        except msgspec.ValidationError as error:
            message = f"{self.base} does not answer with the status of a run of k2: {error}"
            raise K2Error(message) from error

    def tokenize(self, text: str) -> list[int]:
        """Tokenize plain text without special tokens (``POST /v1/tokenize``, k2 only).

        Raises:
            K2Error: if the server cannot be reached, or has no such route.
        """
        body = {"prompt": text, "add_special_tokens": False}
        tokens = self._ask("POST", "tokenize", json=body).get("tokens")
        try:
            return msgspec.convert(tokens, list[int])
        except msgspec.ValidationError as error:
            raise no_openai_api(self.base, error) from error

    def count_tokens(
        self,
        model: ModelInfo,
        messages: list[dict[str, Any]],
        options: GenerationOptions,
        tools: list[dict[str, Any]] | None = None,
    ) -> int:
        """Count the tokens of the prompt of a conversation (``POST /v1/tokenize``, k2 only).

        Raises:
            K2Error: if the server cannot be reached, refuses, or has no such route.
        """
        body: dict[str, Any] = {"model": model.name, "messages": messages}
        if tools:
            body["tools"] = tools
        if options.reasoning_effort is not None:
            body["reasoning_effort"] = options.reasoning_effort
        found = count(self._ask("POST", "tokenize", json=body).get("count"))
        if found is None:
            raise no_openai_api(self.base, ValueError("no count of tokens"))
        return found

    def chat(
        self,
        model: ModelInfo,
        messages: list[dict[str, Any]],
        options: GenerationOptions,
        response_format: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        *,
        private: bool = False,
    ) -> Generator[StreamEvent]:
        """Stream an answer to a conversation. Closing the generator cancels it on the server.

        Args:
            response_format: the form of the answer, as in OpenAI's API.
            tools: functions that the model may call, as in OpenAI's API.
            private: keep what the run computes off its disks (k2 only).

        Raises:
            UsageError: if the server refuses the response format.
            K2Error: if it refuses the request, or the connection is lost.
        """
        body = {"model": model.name, "messages": messages, **options.members()}
        if response_format is not None:
            body["response_format"] = response_format
        if tools:
            body["tools"] = tools
        if private and model.is_k2:
            body["k2"] = {"cache": "memory"}
        return self._stream("chat/completions", body, progress=model.is_k2)

    def complete(self, model: ModelInfo, prompt: list[int], tokens: int) -> Completion:
        """Generate exactly ``tokens`` tokens after a prompt of token ids.

        Stop tokens are ignored and the prefix cache is not used (both k2 only).

        Raises:
            K2Error: if the request fails, or the server ends the answer early.
        """
        body = {
            "model": model.name,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "k2": {"cache": False, "ignore_stop_tokens": True, "speculation": False},
        }
        started_at = time.monotonic()
        announced: list[float] = []
        counted: list[float] = []
        ended: Ended | None = None
        for event in self._stream("completions", body, progress=model.is_k2):
            if isinstance(event, Ended):
                ended = event
            elif not isinstance(event, Progress) or event.completion_tokens is not None:
                announced.append(time.monotonic())
            if isinstance(event, Progress) and event.completion_tokens is not None:
                counted += [announced[-1]] * (min(event.completion_tokens, tokens) - len(counted))
        done = _completion(started_at, announced, time.monotonic(), ended, tokens)
        return replace(done, token_times=tuple(counted))

    def _stream(
        self, route: str, body: dict[str, Any], *, progress: bool
    ) -> Generator[StreamEvent]:
        options = {"include_usage": True, **({"include_progress": True} if progress else {})}
        body = {**body, "stream": True, "stream_options": options}
        with (
            self._failures(),
            self._http.stream("POST", f"{self.base}/{route}", json=body) as response,
        ):
            if not response.is_success:
                raise self._refusal(response)
            yield from events(lines(response.iter_bytes(), self.base), self.base)

    def _ask(self, method: str, route: str, **options: Any) -> dict[str, Any]:
        """Send a request and return the object in the answer.

        Raises:
            K2Error: if the server cannot be reached, refuses, or answers with something else.
        """
        with (
            self._failures(),
            self._http.stream(method, f"{self.base}/{route}", **options) as response,
        ):
            if not response.is_success:
                raise self._refusal(response)
            return decoded(self._body(response), self.base)

    def _body(
        self,
        response: httpx2.Response,
        limit_bytes: int | None = None,
        limit_seconds: float = READ_SECONDS,
    ) -> bytes:
        most_bytes = _MAX_ANSWER_BYTES if limit_bytes is None else limit_bytes
        body, began = bytearray(), time.monotonic()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > most_bytes:
                raise K2Error(f"{self.base} sends more than {most_bytes} bytes")
            if time.monotonic() - began > limit_seconds:
                raise ClusterError(f"{self.base} did not answer in time", "k2 ps")
        return bytes(body)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            with proxy_errors():
                yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            if (failure := tls_failure(error, self.base)) is not None:
                raise ClusterError(*failure) from error
            through, hint = unreachable(self.base, "k2 ps")
            message = f"nothing answers at {self.base}{through}: {error}"
            raise ClusterError(message, hint) from error
        except httpx2.TimeoutException as error:
            raise ClusterError(f"{self.base} did not answer in time", "k2 ps") from error
        except httpx2.TransportError as error:
            message = f"the connection to {self.base} was lost: {error}"
            hint = "k2 ps"
            if isinstance(error, httpx2.RemoteProtocolError) and self.base.startswith("http:"):
                # What uvicorn does with plain HTTP on a port with TLS.
                hint += f"; if it serves HTTPS: k2 chat --url https{self.base[4:]}"
            raise ClusterError(message, hint) from error
        except httpx2.HTTPError as error:  # such as a body that cannot be unpacked
            raise K2Error(f"{self.base} does not answer as an HTTP server: {error}") from error

    def _refusal(self, response: httpx2.Response) -> K2Error:
        body = self._body(response)
        message = error_message(body) or _NO_MESSAGE.format(response.status_code)
        if response.status_code in (400, 422) and concerns_field(body, "response_format"):
            return UsageError(f"{self.base} refused the schema: {message}")
        return _failure(response.status_code, message, self.base)


@dataclass(frozen=True, slots=True)
class CompletionSource:
    """One model of one server, as the target of a benchmark."""

    client: ApiClient
    model: ModelInfo

    def tokenize(self, text: str) -> list[int]:
        """Tokenize plain text without special tokens."""
        return self.client.tokenize(text)

    def complete(self, prompt: list[int], tokens: int) -> Completion:
        """Generate exactly ``tokens`` tokens without the prefix cache."""
        return self.client.complete(self.model, prompt, tokens)


def _has_parser(entry: dict[str, Any], member: str) -> bool | None:
    parser = entry.get(member)
    return None if not isinstance(parser, str) else parser != "none"


def _failure(status: int, message: str, base: str) -> K2Error:
    if status in (401, 403):
        return NotAuthorisedError(
            f"{base}: {message}",
            "export K2_API_KEY=KEY, with a key that the server accepts",
        )
    if status == 503:
        return ClusterError(f"{base} cannot answer: {message}", "k2 ps")
    if status == 404 and message == _NO_MESSAGE.format(404):
        return K2Error(f"{base} is no OpenAI-compatible API: {message}", "k2 ps")
    return K2Error(f"{base} refused the request: {message}")


def _completion(
    started_at: float, announced: list[float], ended_at: float, ended: Ended | None, asked: int
) -> Completion:
    usage = ended.usage if ended else {}
    generated = usage.get("completion_tokens")
    if ended is None or not announced or generated != asked:
        raise K2Error(f"the server generated {generated or 0} tokens instead of {asked}")
    details = usage.get("prompt_tokens_details")
    cached = count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    times = usage.get("timings")
    return Completion(
        started_at=started_at,
        first_token_at=announced[0],
        last_token_at=announced[-1],
        ended_at=ended_at,
        prompt_tokens=count(usage.get("prompt_tokens")) or 0,
        completion_tokens=generated,
        cached_tokens=cached or 0,
        timings=read_timings(times) if times else None,
    )
