"""Rank 0's runner of a tensor-parallel instance: every step is sent to the other ranks, then launched here."""

from collections.abc import Sequence as Ids

from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.engine.step import PendingStep, Runner, StepResult
from hbserve_core.errors import RankFailed
from hbserve_core.ranks.step_message import StepWriter
from hbserve_core.ranks.workers import Workers
from hbserve_core.transfers.launched_steps import LaunchedStep


class TensorParallelRunner:
    """Runner over all ranks of an instance. All methods raise RankFailed if a rank is lost."""

    def __init__(self, runner: Runner, workers: Workers) -> None:
        """runner: this rank's own runner."""
        self.model_config = runner.model_config
        self.device = runner.device
        self.dtype = runner.dtype
        self.fingerprint = runner.fingerprint
        self.pool = runner.pool
        self.overlaps = runner.overlaps
        self.transfer_addresses: Ids[str] = workers.transfer_addresses
        self._runner = runner
        self._num_steps = 0
        self.workers = workers
        # Without overlap rank 0 reads each token, and sends it with the next step.
        self._writer = StepWriter(draws=runner.overlaps)

    def launch(self, batch: Ids[ScheduledChunk]) -> PendingStep:
        with self.workers.naming_the_lost_rank():
            try:
                self.workers.send(self._writer.write(batch))
                pending = self._runner.launch(batch)
                self._num_steps += 1
            except RankFailed:
                raise
            except BaseException as error:
                # This includes Ctrl-C: the other ranks are in the midst of this step, and would add its values to the
                # next.
                self.workers.fail_all(f"rank 0 has left a step unfinished: {type(error).__name__}: {error}")
                raise

        def result() -> StepResult:
            with self.workers.naming_the_lost_rank():
                return pending()

        return result

    @property
    def computed(self) -> LaunchedStep | None:
        """Marker of the last launched step. Each rank has an event of its own, which it finds by the step's number."""
        event = self._runner.computed
        return None if event is None else LaunchedStep(self._num_steps, event)

    def draw(self) -> None:
        with self.workers.naming_the_lost_rank():
            self._runner.draw()

    def is_idle(self) -> bool:
        return self._runner.is_idle()

    def close(self) -> None:
        self.workers.close()
        self._runner.close()
