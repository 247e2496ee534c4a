"""Watches that leader and followers agree: digests of what each believes to hold, compared.

Every so many steps a decision asks for a digest of the state after it: the step's number, the
ids of sequences and prefixes, and who is in which row of which batch. A follower that differs
would compute wrong text without any error; so a difference ends the run. In tensor parallelism
a mark of the step is summed over the ranks as well: it shows whether their sums are still of the
same things.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, field

from k2cli.errors import ClusterError
from k2cli.protocol import StepDigest
from k2cli.rank.control import Followers

STEPS_BETWEEN = 32
_BUG = (
    "this is a bug in k2 or a damaged machine; the run ended before it could give more wrong text"
)


@dataclass(slots=True)
class Agreement:
    """The leader's own digests, and the answers that are still due."""

    followers: Followers
    size: int
    _own: dict[int, str] = field(default_factory=dict)
    _early: list[StepDigest] = field(default_factory=list)
    _answers: dict[int, int] = field(default_factory=dict)

    def is_due(self, step: int) -> bool:
        """Whether a decision with this number should ask for a digest."""
        return self.size > 1 and step % STEPS_BETWEEN == 0

    def expect(self, step: int, digest: str, *, in_step: bool) -> None:
        """The leader's own digest after a step, and whether the ranks' sums are of one step.

        Raises:
            ClusterError: if they are not.
        """
        if not in_step:
            raise ClusterError(f"the ranks' sums are out of step (seen in step {step})", _BUG)
        self._own[step] = digest

    def check(self) -> None:
        """Compare what followers have answered so far.

        Raises:
            ClusterError: if a follower's state is not the leader's.
        """
        waiting, self._early = self._early, []
        while True:
            try:
                message = self.followers.inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, StepDigest) and message.state:
                waiting.append(message)
        for answer in waiting:
            if answer.step not in self._own:
                # In a pipeline the early stages are ahead of the leader's own part.
                self._early.append(answer)
                continue
            if answer.state != self._own[answer.step]:
                raise ClusterError(
                    f"rank {answer.rank} disagrees with the leader about the state after step "
                    f"{answer.step} ({answer.state} against {self._own[answer.step]})",
                    _BUG,
                )
            self._count(answer.step)

    def _count(self, step: int) -> None:
        self._answers[step] = self._answers.get(step, 0) + 1
        if self._answers[step] == self.size - 1:
            del self._answers[step], self._own[step]
