"""What all messages have in common, and the one that everybody sends."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages; the class name is the value of ``type``."""


class Heartbeat(Message, tag=True, frozen=True):
    """I am alive. Also travels between guards, and from a guard to its rank."""
