"""The keywords of JSON Schema: which are held, which say nothing about validity, which are refused.

"Held" means that llguidance (1.9) lets no answer through that breaks them, in the form in which
``normal_form`` writes them. ``tests/server/structured/test_keywords.py`` tries every one.
"""

from __future__ import annotations

DRAFTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
    "http://json-schema.org/schema",
)
"""Values of ``$schema`` that are understood, without a ``#`` at their end."""

NUMBERS = ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
PLAIN = ("type", *NUMBERS, *COUNTS, "pattern", "format", "required", "const", "enum")
"""Held keywords whose values have no schemas in them."""

NAMED = ("properties", "patternProperties")
"""Held keywords whose values are objects of schemas."""

LISTS = ("prefixItems", "allOf", "anyOf", "oneOf")
"""Held keywords whose values are arrays of schemas."""

SINGLE = ("items", "additionalItems", "additionalProperties")
"""Held keywords whose values are schemas."""

ORDER = (
    "type",
    *NUMBERS,
    *COUNTS,
    "pattern",
    "format",
    "prefixItems",
    "items",
    "properties",
    "patternProperties",
    "additionalProperties",
    "required",
    "const",
    "enum",
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
)
"""The order of keywords in the normal form, which is that in which llguidance compiles them."""

ANNOTATIONS = frozenset(
    {
        "$anchor", "$comment", "$defs", "$id", "$schema", "$vocabulary", "contentEncoding",
        "contentMediaType", "contentSchema", "default", "definitions", "deprecated", "description",
        "discriminator", "example", "examples", "externalDocs", "id", "readOnly", "title",
        "writeOnly", "xml",
    }
)  # fmt: skip
"""Keywords that do not decide what is valid: those of JSON Schema 2020-12, and OpenAPI's."""

_NOT_HELD = "cannot be held by a grammar"
REFUSED = {
    "$dynamicAnchor": _NOT_HELD,
    "$dynamicRef": _NOT_HELD,
    "$recursiveAnchor": _NOT_HELD,
    "$recursiveRef": _NOT_HELD,
    "contains": _NOT_HELD,
    "dependencies": _NOT_HELD,
    "dependentRequired": _NOT_HELD,
    "dependentSchemas": _NOT_HELD,
    "disallow": "is of a draft that is too old",
    "divisibleBy": "is of a draft that is too old: the word is 'multipleOf'",
    "else": f"{_NOT_HELD}: 'anyOf' can say the same",
    "extends": "is of a draft that is too old: the word is 'allOf'",
    "if": f"{_NOT_HELD}: 'anyOf' can say the same",
    "maxContains": _NOT_HELD,
    "minContains": _NOT_HELD,
    "not": _NOT_HELD,
    "nullable": "is no keyword of JSON Schema: put \"null\" into 'type'",
    "propertyNames": f"{_NOT_HELD}: 'patternProperties' can say the same",
    "then": f"{_NOT_HELD}: 'anyOf' can say the same",
    "unevaluatedItems": f"{_NOT_HELD}: use 'items'",
    "unevaluatedProperties": f"{_NOT_HELD}: use 'additionalProperties'",
    "uniqueItems": _NOT_HELD,
}
"""Keywords that decide what is valid, and that are refused, with the reason."""

FORMATS = frozenset(
    {
        "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid",
    }
)  # fmt: skip
"""Formats of strings that are held."""

IN_PLACE = frozenset({"allOf", "anyOf", "oneOf", "$ref"})
"""Keywords that apply further schemas to the same value."""

KNOWN = frozenset({*PLAIN, *NAMED, *LISTS, *SINGLE, "$ref", *REFUSED}) | ANNOTATIONS
"""All keywords that have a meaning."""
