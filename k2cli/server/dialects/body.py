"""The base of all request bodies: strict types, no unknown fields, and null for what is absent."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Body(BaseModel):
    """A JSON object of a request. Unknown members are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        # Unknown fields too: some clients send null for every field that they do not use.
        if not isinstance(value, dict):
            return value
        return {name: member for name, member in value.items() if member is not None}
