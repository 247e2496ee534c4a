"""The live view in textual, without a terminal: screens are compared as text."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from k2cli.client.status_watch import Observation
from k2cli.ui.top.app import TopApp
from k2cli.ui.top.look import Look
from tests.ui.top.statuses import document, request
