"""Rank 0's runner of a tensor-parallel instance: every step is told to the other ranks, then launched here."""

from collections.abc import Sequence as Ids

from hbserve_core.engine.runner import PendingStep, Runner, StepTokens
from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.errors import RankFailed
from hbserve_core.ranks.step_message import StepWriter
from hbserve_core.ranks.workers import Followers


class TensorParallelRunner:
    """A Runner. All methods raise RankFailed if a rank is lost."""

    def __init__(self, runner: Runner, followers: Followers) -> None:
        """runner: this rank's own."""
        self.model_config, self.device, self.dtype = runner.model_config, runner.device, runner.dtype
        self.fingerprint, self.pool, self.overlaps = runner.fingerprint, runner.pool, runner.overlaps
        self.transfer_addresses: Ids[str] = followers.transfer_addresses
        self._runner = runner
        self.followers = followers
        # Without overlap rank 0 reads each token, and tells it with the next step.
        self._writer = StepWriter(draws=runner.overlaps)

    def launch(self, batch: Ids[ScheduledChunk]) -> "TensorParallelStep":
        with self.followers.blamed():
            try:
                self.followers.send(self._writer.write(batch))
                return TensorParallelStep(self._runner.launch(batch), self.followers)
            except RankFailed:
                raise
            except BaseException as error:
                # A Ctrl-C too: the others are in the midst of this step, and would add it to the next.
                self.followers.give_up(f"rank 0 has left a step unfinished: {type(error).__name__}: {error}")
                raise

    def close(self) -> None:
        self.followers.close()
        self._runner.close()


class TensorParallelStep:
    """A step that all ranks compute."""

    def __init__(self, pending: PendingStep, followers: Followers) -> None:
        self._pending = pending
        self._followers = followers

    def tokens(self) -> StepTokens:
        with self._followers.blamed():
            return self._pending.tokens()
