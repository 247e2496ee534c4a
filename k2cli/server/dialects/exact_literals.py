"""Fields that take certain values only. A literal alone would take 0 for false, and true for 1."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be a boolean: true or false")
    return value


def _integer(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError("must be an integer")
    return value


def _cache_use(value: Any) -> Any:
    if not isinstance(value, bool) and value != "memory":
        raise ValueError('must be true, false or "memory"')
    return value


Off = Annotated[Literal[False], BeforeValidator(_boolean)]
Zero = Annotated[Literal[0], BeforeValidator(_integer)]
One = Annotated[Literal[1], BeforeValidator(_integer)]
CacheUse = Annotated[Literal[True, False, "memory"], BeforeValidator(_cache_use)]
