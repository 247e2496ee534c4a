"""Fixtures for all tests: an isolated k2, the models to test with, and a check for leftovers.

* Every test has configuration, state and data folders of its own, through ``K2_*_DIR``.
* ``demo_checkpoint`` is the real converted demo model. It costs a download of 98 MB, so it is kept
  in a cache folder that outlives the test run; ``toy_k2`` is built anew in each run.
* No guard or rank that a test started may outlive the run: ``_no_process_left`` fails it if so.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import logging
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from k2cli.agent.run_processes import run_of
from tests.support.ssh_fixture import running_ssh_server, ssh_server  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
SESSION_MARK = "K2_TEST_SESSION"
OLD_MODEL_SECONDS = 24 * 3600


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect the tests without the cyclic garbage collector, and leave their modules out of it.

    All modules together are some million objects, which live until the end. The collector would
    look at each of them again and again: 5 s of 19 s in each process that collects the tests, and
    0.1 s whenever a test asks for a collection.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def _isolate(patch: pytest.MonkeyPatch, base: Path) -> None:
    """Point k2 at folders under ``base`` and take the user's own settings away."""
    for name in [name for name in os.environ if name.startswith("K2_") and name != SESSION_MARK]:
        patch.delenv(name)
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS"):
        patch.delenv(name, raising=False)
    for kind in ("config", "state", "data"):
        patch.setenv(f"K2_{kind.upper()}_DIR", str(base / kind))
    patch.setenv("NO_COLOR", "1")
    patch.setenv("COLUMNS", "80")
    # Subprocesses find this checkout's package from any working directory.
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(ROOT), *(path for path in inherited if os.path.isabs(path) and path != str(ROOT))]
    patch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture(scope="session", autouse=True)
def _isolated_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolation for fixtures of a wider scope than one test, such as a run that a module shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SESSION_MARK, uuid.uuid4().hex)
        # A mock Hub may be set up by a test; nothing else may reach out by accident.
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.delenv("HF_TOKEN", raising=False)
        _isolate(patch, tmp_path_factory.mktemp("k2"))
        yield


@pytest.fixture(autouse=True)
def _isolated_test(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fresh K2_CONFIG_DIR, K2_STATE_DIR and K2_DATA_DIR for one test.

    Tests that share a run of their module keep the session's folders (mark ``shared_state``), so
    that ``k2 ps`` and ``k2 stop`` see it.
    """
    if request.node.get_closest_marker("shared_state"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        _isolate(patch, tmp_path_factory.mktemp("k2"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_children() -> None:
    """Undo an ignored SIGINT, which a shell gives to what it runs in the background.

    Programs that tests start would inherit it, and could not be interrupted.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logging_enabled() -> None:
    """Enable logging again: some programs and tests switch it off for the whole process."""
    logging.disable(logging.NOTSET)


# --- leftovers ----------------------------------------------------------------------------------


def _belongs_to(process: psutil.Process, mark: str) -> bool:
    try:
        if run_of(process.cmdline()) is None:
            return False
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and process.environ().get(SESSION_MARK) == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def runtime_processes() -> list[psutil.Process]:
    """Guards and ranks that this test session started and that still live.

    They are known by an environment variable that they inherit, since other k2 runs, of another
    test session for instance, may live on the same machine.
    """
    mark = os.environ[SESSION_MARK]
    return [process for process in psutil.process_iter() if _belongs_to(process, mark)]


@pytest.fixture(scope="session", autouse=True)
def _no_process_left(_isolated_session: None) -> Iterator[None]:
    """Fail the session if a guard or rank is left at its end, and end what is left, by pid."""
    yield
    left = runtime_processes()
    _, alive = psutil.wait_procs(left, timeout=15)
    described = [f"{process.pid}: {' '.join(process.cmdline())}" for process in alive]
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
    if described:
        pytest.fail("processes were left behind:\n" + "\n".join(described), pytrace=False)


# --- models -------------------------------------------------------------------------------------


def _cache_directory() -> Path:
    """Folder that keeps the demo model between test runs; git ignores ``.k2``."""
    if configured := os.environ.get("XDG_CACHE_HOME"):
        return Path(configured) / "k2-tests"
    return ROOT / ".k2" / "tests"


@contextlib.contextmanager
def cache_lock() -> Iterator[None]:
    """Held while the kept models are made: test processes beside one another need them at once."""
    _cache_directory().mkdir(parents=True, exist_ok=True)
    with (_cache_directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _converter_digest() -> str:
    """Identify the code that makes the demo model: a change of it must not be hidden by a cache."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "k2cli" / "models").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _download_demo(folder: Path) -> None:
    """Let k2 itself fetch and convert the demo model into ``folder``, whole or not at all."""
    from k2cli.errors import K2Error
    from k2cli.models.sources.download import fetch

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        fetch("demo", destination=partial, on_event=lambda _: None)
    except K2Error as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = f"the demo model could not be made: {error.message}"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    partial.rename(folder)


def _drop_old_models(keep: Path) -> None:
    """Remove models that older code made, but none that another test session may be reading."""
    for old in keep.parent.glob("demo-*"):
        if old != keep and time.time() - old.stat().st_mtime > OLD_MODEL_SECONDS:
            shutil.rmtree(old, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_checkpoint(_isolated_session: None) -> Path:
    """Folder of the converted demo model (SmolLM2-135M-Instruct).

    Skips, or fails in CI, where it is not cached and cannot be downloaded.
    """
    folder = _cache_directory() / f"demo-{_converter_digest()}"
    with cache_lock():
        if not (folder / "config.json").is_file():
            _download_demo(folder)
            _drop_old_models(folder)
    return folder


@pytest.fixture(scope="session")
def toy_k2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a seeded toy of the ``kimi_k2`` architecture with K2's kind of tokenizer."""
    from lab.toy_k2.checkpoint import build_toy_k2

    folder = tmp_path_factory.mktemp("models") / "toy-k2"
    build_toy_k2(folder)
    return folder
