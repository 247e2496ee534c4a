"""The base class of messages, and the heartbeat that all conversations share."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages. The class name is the value of ``type``."""


class Heartbeat(Message, tag=True, frozen=True):
    """Sign of life, between supervisor and guards, and from a guard to its rank."""
