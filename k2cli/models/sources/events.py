"""Events and results of a download, for the commands that show them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k2cli.models.sources.parallel_download import DownloadProgress, FileFinished


@dataclass(frozen=True, slots=True)
class StepStarted:
    """Start of a step; ``text`` describes it for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class BytesDone:
    """Progress within the step; ``total_bytes`` is 0 while unknown."""

    done_bytes: int
    total_bytes: int


Event = StepStarted | BytesDone | DownloadProgress | FileFinished
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """File of the model, by its name in the folder; ``missing_bytes`` are still to be fetched."""

    name: str
    nbytes: int
    missing_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """Result of ``fetch``. ``was_there`` is True if there was nothing to do.

    ``stored_bytes`` is the size of the weights; ``path`` is the model's folder, also in a dry run.
    ``commit`` is set for repositories, and ``warnings`` say what is odd about the model.
    """

    model: str
    path: Path | None
    stored_bytes: int
    files: tuple[FetchedFile, ...]
    was_there: bool
    commit: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(file.missing_bytes for file in self.files)
