"""The thread that an instance's engine runs in. Heartbeats and transfers go on in the event loop meanwhile."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from hbserve_core.engine import Engine, EngineStats, Reservation, StepOutput

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EngineThread:
    """Runs commands and steps in turn; sleeps while there is neither.

    The listeners are called in the event loop. `on_failure` is called once, when the engine cannot go on.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        on_output: Callable[[StepOutput], None],
        on_reservation: Callable[[Reservation], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._make_engine = make_engine
        self._on_output = on_output
        self._on_reservation = on_reservation
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stats = EngineStats()
        """As of the last step or command. May be read from any thread."""

    async def start(self) -> Engine:
        """Make the engine, in its thread.

        Raises:
            Exception: whatever `make_engine` raised.
        """
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Future[Engine] = self._loop.create_future()
        self._thread.start()
        return await self._made

    async def stop(self) -> None:
        """End after the step that is under way. Commands that are queued are dropped."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Run `command(engine)` between two steps, and return or raise what it does."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run(engine: Engine) -> None:
            try:
                result = command(engine)
            except Exception as error:  # belongs to the caller
                self._tell(_fail, answer, error)
            else:
                self._tell(_succeed, answer, result)

        self._commands.put(run)
        return await answer

    def _tell(self, listener: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(listener, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.debug("an engine event came after the loop was closed")

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except Exception as error:  # belongs to `start`
            self._tell(_fail, self._made, error)
            return
        self._tell(_succeed, self._made, engine)
        try:
            while self._run_commands(engine):
                for reservation in engine.poll_reservations():
                    self._tell(self._on_reservation, reservation)
                for output in engine.step():
                    self._tell(self._on_output, output)
                self.stats = engine.stats()
        except Exception as error:
            logger.exception("the engine failed")
            self._tell(self._on_failure, error)

    def _run_commands(self, engine: Engine) -> bool:
        """Run what is queued; wait for something to do if there is nothing. False: stop."""
        try:
            while (command := self._commands.get(block=not engine.has_work() or engine.stalled)) is not None:
                command(engine)
                self.stats = engine.stats()
                if self._commands.empty():
                    return True
        except queue.Empty:
            return True
        return False


def _succeed(answer: "asyncio.Future[T]", result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: "asyncio.Future[T]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
