"""The ways in which weights travel; light to import, for the command line."""

from __future__ import annotations

from typing import Literal

Over = Literal["auto", "tls", "ssh", "copy"]
"""TLS from node to node, one stream through ssh, or a copy by rsync or scp."""
