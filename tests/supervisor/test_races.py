"""What a supervisor leaves when something else happens at the same moment."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from k2cli.agent.run_folder import run_folder
from k2cli.errors import ClusterError
from k2cli.nodes.local import LocalNode
from k2cli.runs.record import RunRecord, read_record
from k2cli.supervisor.journal import Journal, _Handler
from k2cli.supervisor.log_file import LogFile
from k2cli.supervisor.supervisor import supervise
from tests.support.harness import prepare_scripted


def test_no_bootstrap_is_written_after_the_bootstraps_of_a_failed_attempt_are_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has the run's secret, and nobody would read or remove it. One of the nodes is slow."""
    specification = prepare_scripted("ring", size=3)
    write, ended, close = LocalNode.write_file, threading.Event(), Journal.close

    def write_file(node: LocalNode, run_id: str, name: str, data: bytes) -> None:
        if name == "bootstrap-1.json":
            raise ClusterError("node b is lost")
        if name == "bootstrap-2.json":
            ended.wait(1.0)  # the run must not end meanwhile
        write(node, run_id, name, data)

    def close_journal(journal: Journal, *end: Any) -> RunRecord:
        record = close(journal, *end)
        ended.set()
        return record

    monkeypatch.setattr(LocalNode, "write_file", write_file)
    monkeypatch.setattr(Journal, "close", close_journal)
    folder = run_folder(specification.run_id)
    record = supervise(folder, lambda event: None)
    assert (record.state, record.cause) == ("failed", "node b is lost")
    assert read_record(folder) == record
    assert [path.name for path in folder.glob("bootstrap-*")] == []


def test_a_log_that_the_user_has_removed_is_begun_anew_at_its_limit(tmp_path: Path) -> None:
    said: list[Any] = []
    log = LogFile(tmp_path / "run.log", 1000, lambda text: text, said.append)
    log.write("one " * 200)
    (tmp_path / "run.log").unlink()
    log.write("two " * 100)
    log.close()
    assert said == []
    assert "two two" in (tmp_path / "run.log").read_text()


async def test_warnings_of_other_threads_are_written_by_the_thread_of_the_journal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """asyncio's threads that wait for processes warn too, also when the run is over."""
    record = read_record(run_folder(prepare_scripted("ring").run_id))
    assert record is not None
    journal, noted = Journal(record, lambda event: None), list[tuple[str, bool]]()
    main = threading.get_ident()

    def note(line: str) -> None:
        noted.append((line, threading.get_ident() == main))

    monkeypatch.setattr(journal, "note_own", note)
    async with journal.kept():
        logging.warning("here")
        (handler,) = (each for each in logging.getLogger().handlers if isinstance(each, _Handler))
        await asyncio.to_thread(logging.warning, "there")
        await asyncio.sleep(0)
    assert noted == [("here", True), ("there", True)]
    ended = asyncio.new_event_loop()
    ended.close()
    handler._loop = ended
    late = logging.makeLogRecord({"msg": "late", "levelno": logging.WARNING})
    await asyncio.to_thread(handler.emit, late)
    assert len(noted) == 2
