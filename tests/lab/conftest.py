"""The lab for tests: two hosts, brought up once per session and taken down with it.

Without root, or without what the lab is built from, these tests are skipped and say why; where
``CI`` or ``K2_REQUIRE_LAB=1`` is set they fail instead. The latter is read before the test's own
settings are taken away, when this module is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab import Lab, LabError, missing_requirements

REQUIRED = bool(os.environ.get("CI")) or os.environ.get("K2_REQUIRE_LAB", "") not in ("", "0")


def _refuse(reason: str) -> None:
    if REQUIRED:
        pytest.fail(f"{reason} (and CI or K2_REQUIRE_LAB is set)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def session_lab(_isolated_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts, ``k2a`` and ``k2b``, that end with this process, however it ends."""
    for reason, hint in missing_requirements():
        _refuse(f"{reason}: {hint}")
    share = [tmp_path_factory.getbasetemp()]
    try:
        lab = Lab.up(f"tests-{os.getpid()}", 2, share=share, tied=True)
    except LabError as error:
        _refuse(f"the lab cannot be built here: {error.message}")
        raise AssertionError from error
    try:
        yield lab
    finally:
        lab.down()


@pytest.fixture
def lab(session_lab: Lab) -> Iterator[Lab]:
    """The session's lab, made new after each test: no test depends on what another one left."""
    try:
        yield session_lab
    finally:
        session_lab.renew()
