"""Access to the Hugging Face Hub through huggingface_hub, which is imported when called.

Downloads are restricted to the files that loading reads (``models.layout``): pickled weights and
Python files are never fetched.
"""

from __future__ import annotations

import contextlib
import glob
import io
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from k2cli.errors import K2Error, UsageError
from k2cli.files import read_regular
from k2cli.models.completeness import is_complete
from k2cli.models.sources.cache_layout import repository_folder
from k2cli.models.sources.expected_files import ExpectedFile, expected_file
from k2cli.models.sources.file_names import is_safe_name
from k2cli.models.sources.http_source import PASSING_STATUSES, HttpService, retry_after
from k2cli.models.sources.hub_errors import hub_errors
from k2cli.models.sources.snapshot_record import begun_commit
from k2cli.units import one_line

_LIGHT_PATTERNS = ("config.json", "generation_config.json")

_READ_TIMEOUT_SECONDS = 20.0
_RANGE_SECONDS = 120.0
"""Limits of reading a header: between two bytes, and in all."""
_RETRIES = 2
_MOST_FILE_BYTES = 2**50
"""A larger size that the Hub states is taken for unknown."""
_LONGEST_WAIT_SECONDS = 60.0
"""A Hub that wants a longer wait before it lists a repository ends the command."""
_COMMIT = re.compile(r"[0-9A-Za-z][\w.-]{0,199}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of a repository at one commit: their sizes and the hashes of their contents.

    ``source`` is the server.
    """

    repo: str
    revision: str
    commit: str
    sizes: dict[str, int]
    hashes: dict[str, str]
    source: Literal["hub", "modelscope"] = "hub"

    def expected(self, name: str) -> ExpectedFile:
        """Return what is known about a file.

        Raises:
            K2Error: if the server gives no hash for it.
        """
        content_hash = self.hashes.get(name, "")
        found = expected_file(name, self.sizes.get(name, 0), content_hash)
        if found is None and self.source == "modelscope":
            raise K2Error(
                f"ModelScope gives no hash for {self.repo}/{name}, so it could not be verified"
            )
        if found is None:
            raise K2Error(
                f"the Hub gives no hash for {self.repo}/{name}, so it could not be verified",
                "use another mirror: see HF_ENDPOINT",
            )
        return found


def _patterns(names: Collection[str]) -> list[str]:
    return [glob.escape(name) for name in names]


def download_repo(
    repo: str,
    revision: str | None,
    names: Collection[str],
    destination: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch files with the Hub library's own transfer, such as Xet, and return their folder.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; the main branch if None.
        names: the files.
        destination: a folder, or None for the cache of the Hub library.
        progress: called with the bytes done and the total bytes of each file.

    Raises:
        NotAuthorisedError: if the repository is gated or private.
        K2Error: if it does not exist or the Hub cannot be reached.
    """
    import huggingface_hub

    with hub_errors(repo, revision):
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                local_dir=destination,
                allow_patterns=_patterns(names),
                tqdm_class=_bar_class(progress),
            )
        )


def download_config(repo: str, revision: str | None = None) -> Path:
    """Fetch only ``config.json`` into the Hub library's cache, and return its folder.

    Raises:
        NotAuthorisedError: if the repository is gated or private.
        K2Error: if it does not exist, has no config or the Hub cannot be reached.
    """
    import huggingface_hub

    with hub_errors(repo, revision):
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(_LIGHT_PATTERNS),
                tqdm_class=_bar_class(None),
            )
        )
    if not (folder / "config.json").is_file():
        raise K2Error(f"{repo} has no config.json", "name a repository that holds a model")
    return folder


def list_repository(repo: str, revision: str | None) -> Listing:
    """List the files of a repository at the commit that a revision now is.

    Raises:
        NotAuthorisedError: if the repository is gated or private.
        UsageError: if the revision has no name that the cache can keep.
        K2Error: if it does not exist, the Hub cannot be reached, or its answer is no list.
    """
    import huggingface_hub

    if revision is not None and not is_safe_name(revision):
        # The cache notes a revision in a file of its name, as for "refs/pr/1".
        raise UsageError(
            f"'{one_line(revision)}' is no name of a revision", f"k2 download {repo}@main"
        )
    with hub_errors(repo, revision):
        info: Any = _asked_again(
            # Listing the tree would be tried again for 15 s, with a warning each time.
            lambda: huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        )
    commit = str(info.sha or "")
    if not _COMMIT.fullmatch(commit):
        raise K2Error(f"the Hub names no commit for {repo}", "check HF_ENDPOINT")
    sizes, hashes = {}, {}
    for file in info.siblings or ():
        if not isinstance(file.rfilename, str):
            raise K2Error(f"the Hub's list for {repo} has a file without name", "check HF_ENDPOINT")
        size = file.lfs.size if file.lfs is not None else file.size
        known = isinstance(size, int) and 0 <= size < _MOST_FILE_BYTES
        sizes[file.rfilename] = size if known else 0
        found = (file.lfs.sha256 if file.lfs is not None else file.blob_id) if known else ""
        hashes[file.rfilename] = str(found or "")
    return Listing(repo, revision or "main", commit, sizes, hashes)


def _asked_again(ask: Callable[[], Any]) -> Any:
    """Ask the Hub again after failures that pass, a few times."""
    import httpx2
    from huggingface_hub import errors

    for attempt in range(_RETRIES):
        wait = 0.5 * 2**attempt
        try:
            return ask()
        except (httpx2.ReadError, httpx2.RemoteProtocolError):
            pass
        except errors.HfHubHTTPError as error:
            if getattr(error.response, "status_code", 0) not in PASSING_STATUSES:
                raise
            asked = retry_after(error.response.headers)
            if asked is not None and asked > _LONGEST_WAIT_SECONDS:
                raise
            wait = max(wait, asked or 0.0)
        time.sleep(wait)
    return ask()


def with_hashes(listing: Listing, names: Collection[str]) -> Listing:
    """Ask for each file whose hash the list lacks; some mirrors say it only there.

    Raises:
        NotAuthorisedError, K2Error: as ``list_repository``.
    """
    import huggingface_hub

    lacking = [name for name in names if not listing.hashes.get(name)]
    if not lacking:
        return listing
    sizes, hashes = dict(listing.sizes), dict(listing.hashes)
    for name in lacking:
        with hub_errors(listing.repo, listing.commit):
            url = huggingface_hub.hf_hub_url(listing.repo, name, revision=listing.commit)
            found = huggingface_hub.get_hf_file_metadata(url)
        if found.size is not None and found.etag and 0 <= found.size < _MOST_FILE_BYTES:
            sizes[name], hashes[name] = found.size, found.etag
    return replace(listing, sizes=sizes, hashes=hashes)


def repository_files(repo: str, revision: str | None) -> dict[str, int]:
    """Return the size of each file of a repository, by path; 0 if the Hub does not say it.

    Raises:
        NotAuthorisedError, K2Error: as ``list_repository``.
    """
    return list_repository(repo, revision).sizes


def http_service(repo: str, commit: str) -> HttpService:
    """Return how to ask the Hub for files of a commit."""
    import huggingface_hub
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # lazily exported
        build_hf_headers,
        hf_raise_for_status,
    )

    def refusal(response: Any, file: ExpectedFile) -> K2Error:
        try:
            with hub_errors(repo, commit):
                hf_raise_for_status(response)
        except K2Error as error:
            return error
        return K2Error(
            f"the Hub does not send {repo}/{file.name}: HTTP {response.status_code}",
            "check HF_ENDPOINT",
        )

    return HttpService(
        name="the Hub",
        url_of=lambda file: huggingface_hub.hf_hub_url(repo, file.name, revision=commit),
        headers=build_hf_headers(),
        refusal=refusal,
    )


def read_range(
    repo: str, revision: str | None, name: str, first: int, count: int
) -> tuple[bytes, int]:
    """Read at most ``count`` bytes of a file, from byte ``first`` on, and the size of the file.

    Reading stops there even if the server sends more. (The library's reader of headers keeps the
    whole answer of a server that ignores the range, which is 5 GB for a shard.)

    Raises:
        NotAuthorisedError, K2Error: as ``list_repository``; also if the server does not serve the
            range, or stops in the middle of it.
    """
    import httpx2
    import huggingface_hub
    from huggingface_hub import errors

    url = huggingface_hub.hf_hub_url(repo, name, revision=revision)
    what = f"{repo}/{name}"
    with hub_errors(repo, revision):
        for attempt in range(_RETRIES):
            try:
                return _read_range(url, what, first, count)
            except httpx2.TransportError:
                pass  # a failed or broken connection may succeed
            except errors.HfHubHTTPError as error:
                if getattr(error.response, "status_code", 0) not in PASSING_STATUSES:
                    raise
            time.sleep(0.25 * 2**attempt)
        return _read_range(url, what, first, count)


def _read_range(url: str, what: str, first: int, count: int) -> tuple[bytes, int]:
    # The library's http_stream_backoff does not handle an error while a body is read.
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # lazily exported
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    wanted = {"range": f"bytes={first}-{first + count - 1}", "accept-encoding": "identity"}
    with get_session().stream(
        "GET", url, headers={**build_hf_headers(), **wanted}, timeout=_READ_TIMEOUT_SECONDS
    ) as response:
        hf_raise_for_status(response)
        size = _size_of_file(response, what, first)
        data = _bounded(response.iter_raw(), count, what)
    if len(data) < min(count, max(0, size - first)):
        raise K2Error(f"the Hub's answer for {what} broke off", "try again")
    return data, size


def _size_of_file(response: Any, what: str, first: int) -> int:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if response.status_code == 206 and match is not None and int(match[1]) == first:
        return int(match[3])
    length = response.headers.get("content-length", "")
    if response.status_code == 200 and first == 0 and length.isdecimal() and len(length) < 19:
        return int(length)  # the server ignores the range: stop receiving
    raise K2Error(
        f"the Hub does not serve a part of {what}", "check HF_ENDPOINT, or run k2 download"
    )


def _bounded(chunks: Iterator[bytes], count: int, what: str) -> bytes:
    deadline = time.monotonic() + _RANGE_SECONDS
    parts: list[bytes] = []
    missing = count
    for chunk in chunks:
        parts.append(chunk[:missing])
        missing -= len(parts[-1])
        if missing <= 0:
            break
        if time.monotonic() > deadline:
            raise K2Error(
                f"the Hub sent {count - missing} of {count} bytes of {what} in "
                f"{_RANGE_SECONDS:.0f} s",
                "try again on a faster network",
            )
    return b"".join(parts)


def cached_folder(repo: str, revision: str | None = None, *, part: bool = False) -> Path | None:
    """Return the repository's folder in the Hub library's cache, without network access.

    None if the files of the model are not all there: the library's own answer also wants files that
    k2 does not fetch, and importing it takes as long as planning a model. With ``part``, weight
    files may be missing whose headers are there.
    """
    folder = _snapshot_folder(repo, revision)
    return folder if folder is not None and is_complete(folder, part=part) else None


def is_begun(repo: str, revision: str | None = None) -> bool:
    """True if a download of that revision to the Hub library's cache has begun."""
    folder = _snapshot_folder(repo, revision)
    if folder is not None and folder.is_dir():
        return True
    return bool(begun_commit(repository_folder(repo), revision or "main"))


def _snapshot_folder(repo: str, revision: str | None) -> Path | None:
    """Return the folder of a revision, which may not exist; None if its commit is not known."""
    base = repository_folder(repo)
    commit = revision or "main"
    if ".." in Path(commit).parts or not base.is_dir():
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = read_regular(base / "refs" / commit, 200).decode().strip()
    return base / "snapshots" / commit if _COMMIT.fullmatch(commit) else None


def _bar_class(progress: Progress | None) -> Any:
    """Make a replacement for tqdm that calls ``progress`` and draws nothing."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class ByteBar(tqdm):  # type: ignore[misc]
        """Progress bar without output; the one that counts bytes calls ``progress``."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            # A disabled bar does not count, so enable it and discard its output.
            kwargs |= {"disable": False, "file": io.StringIO()}
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            if progress is not None and self._counts_bytes:
                progress(int(self.n), int(self.total or 0))

    return ByteBar
