"""Ids of tool calls for Anthropic's clients, and back, without any state.

K2's ids, such as ``functions.Bash:3``, have letters that Anthropic's API refuses in an id, so a
client that continues a conversation there would fail. They are also the same in every conversation,
while agents keep the calls of several conversations in one table. Both are solved by
``toolu_k2_3_Bash_1f0c9a72``, whose last part is of the request. The id that the model wrote can be
read out of it, and the prompt has that one.
"""

from __future__ import annotations

import re

_K2_ID = re.compile(r"functions\.([A-Za-z0-9_-]{1,128}):(\d{1,9})")
_ALLOWED = re.compile(r"[A-Za-z0-9_-]{1,256}")
_CLIENT_ID = re.compile(r"toolu_k2_(\d{1,9})_([A-Za-z0-9_-]{1,128})_[0-9a-f]{8}")
_HEX = "toolu_hex_"
_SALT_LETTERS = 8


def client_id(model_id: str, request_id: str) -> str:
    """Return the id for the client of a call in the answer to a request.

    Args:
        model_id: the id that the model wrote.
        request_id: the engine's id of the request, in hexadecimal digits.
    """
    if of_k2 := _K2_ID.fullmatch(model_id):
        name, index = of_k2.groups()
        return f"toolu_k2_{index}_{name}_{request_id[:_SALT_LETTERS]}"
    if _ALLOWED.fullmatch(model_id):
        return model_id
    return _HEX + model_id.encode("utf-8", "replace").hex()


def model_id(client_id: str) -> str:
    """Return the id that the model wrote; ids that were not made here are returned as they are."""
    if of_k2 := _CLIENT_ID.fullmatch(client_id):
        index, name = of_k2.groups()
        return f"functions.{name}:{index}"
    if client_id.startswith(_HEX):
        try:
            return bytes.fromhex(client_id.removeprefix(_HEX)).decode()
        except ValueError:
            return client_id
    return client_id
