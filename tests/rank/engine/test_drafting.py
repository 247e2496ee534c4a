"""What a request takes of a step that verified a draft."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from k2cli.protocol import Generate, Sampling
from k2cli.rank.engine.drafting import Drafting
from k2cli.rank.engine.requests import Running

STOP = 9


@pytest.mark.parametrize(
    ("drafts", "chosen", "taken", "accepted"),
    [
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], 3),  # all right, and the token after them
        ([1, 2, 3], [1, 2, 5, 6], [1, 2, 5], 2),  # what was chosen after a wrong one is nothing
        ([1, 2, 3], [7, 2, 3, 4], [7], 0),
        ([1, 2, 3], [1, 2, 3, STOP], [1, 2, 3, STOP], 3),
        ([1, STOP, 3], [1, STOP, 3, 4], [1, STOP], 1),  # right, but the end of the answer
        ([1, 2, 3], [1, STOP, 3, 4], [1, STOP], 1),
        ([STOP], [STOP, 4], [STOP], 0),
    ],
)
def test_what_is_taken_ends_with_the_first_token_that_was_not_drafted_or_stops(
    drafts: list[int], chosen: list[int], taken: list[int], accepted: int
) -> None:
    taken_back: list[int] = []
    sampler: Any = SimpleNamespace(take_back=taken_back.append)
    ticket: Any = None
    request = Generate("r", [5, 6], 50, Sampling(), [STOP])
    row = Running(request, 1, ticket, sampler, 60, 0.0, 0.0)
    row.steps = 4
    assert Drafting("always", 100).accept(row, drafts, chosen, 0.1) == taken
    # A step was counted when it was decided; the random keys of later tokens are used again.
    assert row.steps == 4 + len(taken) - 1
    assert taken_back == [len(chosen) - len(taken)]
    assert (row.draft_tokens, row.accepted_tokens) == (len(drafts), accepted)


def test_a_draft_is_no_longer_than_the_answer_or_the_context() -> None:
    """The step gives one token beside the draft, and the last token of a context has no place."""
    ticket: Any = None
    for limit, context, most in ((20, 100, 19), (50, 10, 7)):
        row = Running(Generate("r", [5, 6], limit, Sampling()), 1, ticket, ticket, 60, 0.0, 0.0)
        assert Drafting("always", context)._most_drafted(row) == most
