"""Access to ModelScope; the only module that imports its client, ``modelscope_hub``, when called.

The client lists the files of a repository with their hashes, and has the user's login. The bytes
come through k2's own transfer: ModelScope serves ranges, as the Hub does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from k2cli.errors import K2Error, NotAuthorisedError, UsageError
from k2cli.models.checkpoint import weight_map_of
from k2cli.models.json_files import json_object
from k2cli.models.layout import INDEX_NAME
from k2cli.models.modelscope_login import stored_token
from k2cli.models.sources.byte_source import PassingError
from k2cli.models.sources.expected_files import ExpectedFile
from k2cli.models.sources.file_names import is_safe_name
from k2cli.models.sources.http_source import HttpService, HttpSource
from k2cli.models.sources.hub import Listing
from k2cli.pip_command import pip_install
from k2cli.proxies import proxy_errors
from k2cli.units import one_line

DEFAULT_REVISION = "master"

_CLIENT = "modelscope-hub>=0.5"
"""Requirement of the extra ``modelscope``, which an environment may be too old to know."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_LISTED = "listing-"
_MOST_FILE_BYTES = 2**50
_MAX_INDEX_BYTES = 50_000_000
_ATTEMPTS = 4
_READ_TIMEOUT_SECONDS = 20.0


def list_repository(repo: str, revision: str | None) -> Listing:
    """List the files of a repository, and pin the commit that a revision now is.

    ModelScope's list does not name the commit. It is that of the file that changed last, if a list
    of that commit has the same contents. If not, the name of the listing is a hash of it.

    Raises:
        NotAuthorisedError: if the repository is private, or wants a login.
        UsageError: if the revision has no name that a path can have.
        K2Error: if it does not exist, cannot be listed, or the client is not installed.
    """
    wanted = revision or DEFAULT_REVISION
    if not is_safe_name(wanted):
        raise UsageError(
            f"'{one_line(wanted)}' is no name of a revision", f"k2 download modelscope:{repo}"
        )
    api = _api()
    entries = _entries(api, repo, wanted)
    sizes = {name: _size_of(entry) for name, entry in entries.items()}
    hashes = {name: _hash_of(entry) for name, entry in entries.items()}
    commit = wanted if _COMMIT.fullmatch(wanted) else _last_commit(entries)
    if commit not in (None, wanted):
        again = _entries(api, repo, commit)
        if {name: _hash_of(entry) for name, entry in again.items()} != hashes:
            commit = None
    if commit is None:
        text = json.dumps(sorted(hashes.items())).encode(errors="replace")
        commit = _LISTED + hashlib.sha256(text).hexdigest()[:40]
    return Listing(repo, wanted, commit, sizes, hashes, "modelscope")


def list_recorded(repo: str, revision: str, commit: str) -> Listing:
    """List the files of a recorded commit; of its branch, if ModelScope named no commit.

    Raises:
        NotAuthorisedError, K2Error: as ``list_repository``.
    """
    return list_repository(repo, revision if commit.startswith(_LISTED) else commit)


def http_service(listing: Listing) -> HttpService:
    """Return how to ask ModelScope for files of a listing.

    Raises:
        K2Error: if the client is not installed.
    """
    api, repo = _api(), listing.repo
    revision = listing.revision if listing.commit.startswith(_LISTED) else listing.commit
    token = api.legacy.token
    headers = {"user-agent": "k2cli"}
    if token:
        headers |= {"authorization": f"Bearer {token}", "cookie": f"m_session_id={token}"}

    def refusal(response: Any, file: ExpectedFile) -> K2Error:
        status = response.status_code
        if status in (401, 403):
            return _refused(f"{repo}/{file.name}", status)
        return K2Error(
            f"ModelScope does not send {repo}/{file.name}: HTTP {status}", "run the command again"
        )

    return HttpService(
        name="ModelScope",
        url_of=lambda file: str(api.legacy.get_download_url(repo, "model", file.name, revision)),
        headers=headers,
        refusal=refusal,
    )


def read_weight_map(listing: Listing) -> dict[str, str] | None:
    """Read the index of a listed repository; None if it has none.

    Raises:
        K2Error: if it cannot be fetched, or is malformed.
    """
    if INDEX_NAME not in listing.sizes:
        return None
    file, path = listing.expected(INDEX_NAME), Path(listing.repo) / INDEX_NAME
    if file.nbytes > _MAX_INDEX_BYTES:
        raise K2Error(f"{path} is larger than {_MAX_INDEX_BYTES} bytes")
    source = HttpSource(http_service(listing), 1, _READ_TIMEOUT_SECONDS)
    try:
        data = _read(source, file)
    finally:
        source.close()
    return weight_map_of(path, json_object(data, path))


def _read(source: HttpSource, file: ExpectedFile) -> bytes:
    """Read a small file, again after failures that pass."""
    for attempt in range(_ATTEMPTS):
        try:
            with source.open(file, 0, file.nbytes) as answer:
                data = b"".join(answer.chunks)
            if len(data) == file.nbytes:
                return data
            reason = "the answer ended early"
        except PassingError as error:
            reason = error.reason
        if attempt + 1 < _ATTEMPTS:
            time.sleep(0.5 * 2**attempt)
    raise K2Error(f"cannot fetch {file.name} from ModelScope: {reason}", "check the network")


# --- the client -----------------------------------------------------------------------------------


def _api() -> Any:
    try:
        import modelscope_hub
    except ImportError as error:
        raise K2Error(
            "ModelScope's client is not installed",
            pip_install(_CLIENT),
        ) from error

    class Config(modelscope_hub.HubConfig):  # type: ignore[misc, unused-ignore]
        """Configuration of the client from its environment, without an identity of the session."""

        def get_session_id(self) -> str:
            # The client would keep one in the home folder, and send it with each request.
            return "0" * 32

        def load_cookies(self) -> None:
            # The client would unpickle them, which can run any program.
            return None

        def load_token(self) -> str | None:
            return stored_token(self.credentials_dir / "cookies")

    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    return modelscope_hub.HubApi(Config())


def _entries(api: Any, repo: str, revision: str) -> dict[str, Mapping[str, Any]]:
    """List the files of a revision by path, without folders.

    Raises:
        NotAuthorisedError, K2Error: as ``list_repository``.
    """
    with _errors(api, repo, revision):
        listed = api.legacy.list_repo_files(repo, "model", revision)
        files = [entry for entry in listed if entry.get("Type") != "tree"]
        names = [entry.get("Path") or entry.get("Name") for entry in files]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a file has no name")
    return dict(zip(names, files, strict=True))


def _size_of(entry: Mapping[str, Any]) -> int:
    size = entry.get("Size")
    return size if isinstance(size, int) and 0 <= size < _MOST_FILE_BYTES else 0


def _hash_of(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a listed file, or "" if the list has none."""
    found = entry.get("Sha256")
    known = isinstance(found, str) and _HASH.fullmatch(found) is not None
    return str(found) if known and isinstance(entry.get("Size"), int) else ""


def _last_commit(entries: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the commit that changed a file last, as far as the list says it."""
    dated = [
        (entry["CommittedDate"], entry["Revision"])
        for entry in entries.values()
        if isinstance(entry.get("CommittedDate"), int)
        and isinstance(entry.get("Revision"), str)
        and _COMMIT.fullmatch(entry["Revision"])
    ]
    return max(dated)[1] if dated else None


@contextlib.contextmanager
def _errors(api: Any, repo: str, revision: str) -> Iterator[None]:
    """Translate exceptions of the client to k2's errors."""
    from modelscope_hub import errors

    host = urlsplit(api.legacy.endpoint).hostname or ""
    try:
        with proxy_errors():
            yield
    except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
        raise _refused(repo, getattr(error, "status_code", None) or 403) from error
    except errors.NotExistError as error:
        raise K2Error(
            f"{host} has no model '{repo}' with a revision '{revision}', or it is private",
            "check the name; for a private one run: modelscope login",
        ) from error
    except errors.HubError as error:
        raise _unreachable(repo, host, error) from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise K2Error(
            f"the answer of {host} for {repo} cannot be read: {_first_line(error)}",
            "check MODELSCOPE_ENDPOINT, and whether this network wants a login first",
        ) from error
    except OSError as error:
        raise _unreachable(repo, host, error) from error


def _unreachable(repo: str, host: str, error: Exception) -> K2Error:
    return K2Error(
        f"cannot list {repo} on {host}: {_first_line(_root(error))}",
        "check the network, and MODELSCOPE_ENDPOINT if you set it",
    )


def _root(error: Exception) -> Exception:
    """Return the error of the system behind the client's, which only repeats names of classes."""
    each: BaseException | None = error
    for _ in range(10):
        each = (each.__cause__ or each.__context__) if each is not None else None
        if isinstance(each, OSError) and each.strerror:
            return each
    return error


def _refused(what: str, status: int) -> NotAuthorisedError:
    return NotAuthorisedError(
        f"ModelScope refuses access to {what} (HTTP {status})", "modelscope login"
    )


def _first_line(error: Exception) -> str:
    """Describe an error without addresses, which may have signatures in them."""
    text = re.sub(r"https?://\S+", "…", str(error)).strip() or type(error).__name__
    return one_line(text.splitlines()[0])[:200]
