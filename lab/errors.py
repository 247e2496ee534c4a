"""The error type of the lab."""

from __future__ import annotations


class LabError(Exception):
    """An operation of the lab that failed: a message of one sentence, and a hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
