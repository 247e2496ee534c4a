"""Events of a download: progress on the terminal, and JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def show_event(event: Any, progress: Any) -> None:
    """Show an event of a download as progress."""
    from k2cli.models.sources.download import BytesDone, StepStarted
    from k2cli.models.sources.parallel_download import DownloadProgress

    if isinstance(event, StepStarted):
        progress.step(event.text)
    elif isinstance(event, BytesDone):
        progress.advance(event.done_bytes, event.total_bytes)
    elif isinstance(event, DownloadProgress):
        progress.transfer(
            event.done_bytes,
            event.total_bytes,
            event.received_bytes,
            event.seconds,
            [(file.name, file.done_bytes, file.total_bytes) for file in event.files],
            event.note,
        )


def event_document(event: Any) -> dict[str, Any]:
    """Return an event of a download as a document."""
    from k2cli.models.sources.download import BytesDone, StepStarted
    from k2cli.models.sources.parallel_download import DownloadProgress, FileFinished

    match event:
        case StepStarted():
            fields: dict[str, Any] = {"event": "step", "text": event.text}
        case BytesDone():
            fields = {
                "event": "progress",
                "done_bytes": event.done_bytes,
                "total_bytes": event.total_bytes,
            }
        case DownloadProgress():
            rate = event.received_bytes / event.seconds if event.seconds > 0 else None
            fields = {
                "event": "progress",
                "done_bytes": event.done_bytes,
                "total_bytes": event.total_bytes,
                "received_bytes": event.received_bytes,
                "bytes_per_second": None if rate is None else round(rate),
                "files": _file_documents(event.files),
                "note": event.note,
            }
        case FileFinished():
            fields = {
                "event": "file",
                "name": event.file.name,
                "bytes": event.file.nbytes,
                "hash": event.file.blob_name,
                "path": str(event.path),
                "received": event.received,
            }
        case _:
            fields = {"event": "unknown"}
    return {"schema_version": 1, **fields}


def _file_documents(files: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"name": file.name, "done_bytes": file.done_bytes, "total_bytes": file.total_bytes}
        for file in files
    ]
