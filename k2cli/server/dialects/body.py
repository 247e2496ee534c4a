"""The base of all request bodies: strict types, no unknown fields, and null for what is absent."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator


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

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe the object for the OpenAPI document: null is accepted for what may be absent."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        members = schema.get("properties", {})
        for name, member in members.items():
            options = member.get("anyOf", [member])
            nullable = not member.keys() - {"default"} or {"type": "null"} in options
            if not nullable and name not in schema.get("required", ()):
                members[name] = {"anyOf": [member, {"type": "null"}]}
        schema["additionalProperties"] = {"type": "null"}
        return schema
