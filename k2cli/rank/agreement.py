"""Regular comparison of digests that leader and followers make of their state.

Every 32 steps a decision asks for a digest of the state after it: the step's number, the tokens of
sequences and prefixes, and the sequence in each row of each batch. A follower that differs would
compute wrong text without any error; so a difference ends the run. In tensor parallelism a known
number is summed over the ranks as well, which detects ranks whose sums belong to different steps.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field

from k2cli.errors import ClusterError
from k2cli.protocol import BlocksFound, BlocksRead, BlockWritten, StepDigest, StoreReport
from k2cli.rank.control import Followers

STEPS_BETWEEN = 32
_BUG = (
    "this is a bug in k2 or a damaged machine; the run ended before it could give more wrong text"
)


@dataclass(slots=True)
class Agreement:
    """The leader's own digests, and the answers of followers that are still due."""

    followers: Followers
    size: int
    on_store: Callable[[StoreReport], None] | None = None
    """Receives what followers report about the prefix cache on disk."""
    _own: dict[int, str] = field(default_factory=dict)
    _early: list[StepDigest] = field(default_factory=list)
    _answers: dict[int, int] = field(default_factory=dict)

    def is_due(self, step: int) -> bool:
        """True if a decision with this number should ask for a digest."""
        return self.size > 1 and step % STEPS_BETWEEN == 0

    def expect(self, step: int, digest: str, *, in_step: bool) -> None:
        """Record the leader's own digest after a step.

        Raises:
            ClusterError: if the ranks' sums were not ``in_step``.
        """
        if not in_step:
            raise ClusterError(f"the ranks' sums are out of step (seen in step {step})", _BUG)
        self._own[step] = digest

    def check(self) -> None:
        """Compare the digests that followers have sent so far.

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
            elif isinstance(message, BlocksFound | BlockWritten | BlocksRead) and self.on_store:
                self.on_store(message)
        for answer in waiting:
            if answer.step not in self._own:
                # The first stages of a pipeline are ahead of the leader's own part.
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
