"""The lease that the chats of a run share."""

from __future__ import annotations

from pathlib import Path

from k2cli.runs.lease import hold, take_over


def test_a_lease_is_shared_until_somebody_has_it_alone(tmp_path: Path) -> None:
    one, two = hold(tmp_path), hold(tmp_path)
    assert one is not None
    assert two is not None
    one.close()
    assert take_over(tmp_path) is None
    two.close()
    alone = take_over(tmp_path)
    assert alone is not None
    assert hold(tmp_path) is None
    alone.close()
