"""k2's errors for the exceptions of huggingface_hub and its HTTP client."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from k2cli.errors import K2Error, NotAuthorisedError
from k2cli.files import DISK_ERRORS, unwritable
from k2cli.models.sources.cache_layout import cache_folder
from k2cli.proxies import proxy_errors, unreachable
from k2cli.units import one_line


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Translate exceptions of the Hub library in the block to k2's errors."""
    import httpx2
    from huggingface_hub import errors

    try:
        with proxy_errors():
            yield
    except errors.HFValidationError as error:
        raise K2Error(f"'{repo}' is not the name of a Hub repository: {error}") from error
    except (httpx2.HTTPError, OSError) as error:
        raise _translated(error, repo, revision) from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        # The library reads what the server says without checks. It may be no JSON: for example, the
        # page of a network that wants a login first.
        text = one_line(f"{type(error).__name__} {error}")[:200]
        raise K2Error(
            f"the Hub's answer for {repo} cannot be read: {text}",
            "check HF_ENDPOINT, and whether this network wants a login first",
        ) from error


def _translated(error: Exception, repo: str, revision: str | None) -> K2Error:
    """Return k2's error for an exception; a wrapper is replaced by the exception that it wraps."""
    from huggingface_hub import constants, errors

    name = f"{repo}@{revision}" if revision else repo
    wrappers = (errors.DryRunError, errors.LocalEntryNotFoundError)
    while isinstance(error, wrappers) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{repo}"
            return NotAuthorisedError(
                f"{repo} is gated: its owner must grant you access, on {page}",
                f"ask for access on {page}, then run: hf auth login",
            )
        case errors.RemoteEntryNotFoundError():
            return K2Error(f"the Hub no longer has a file of {name}", "run the command again")
        case errors.RevisionNotFoundError():
            return K2Error(
                f"{repo} has no revision '{revision}'",
                f"its main branch: k2 download {repo}; its others: {constants.ENDPOINT}/{repo}",
            )
        case errors.RepositoryNotFoundError():
            # The Hub answers 401 for missing repositories too, to hide the names of private ones.
            return K2Error(
                f"the Hub has no repository '{repo}', or it is private",
                "check the name; for a private one run: hf auth login",
            )
        case errors.OfflineModeIsEnabled():
            offline = f"the Hub was not asked for {name}: HF_HUB_OFFLINE is set"
            return K2Error(offline, "unset HF_HUB_OFFLINE")
        case errors.HfHubHTTPError():
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                refusal = f"the Hub refuses access to {name} (HTTP {status})"
                return NotAuthorisedError(refusal, "hf auth login")
            if status == 404:
                return K2Error(
                    f"{constants.ENDPOINT} has no {name} (HTTP 404)",
                    "check the name, and HF_ENDPOINT if you set it",
                )
            return K2Error(f"the Hub failed on {name}: HTTP {status}", "try again later")
        case OSError() if error.errno in DISK_ERRORS:
            path = Path(os.fsdecode(error.filename or cache_folder()))
            return unwritable(error, path)
    text = str(error).strip() or type(error).__name__
    through, hint = unreachable(
        constants.ENDPOINT, "check the network, and HF_ENDPOINT if you set it"
    )
    return K2Error(f"cannot fetch {name} from the Hub{through}: {text.splitlines()[0]}", hint)
