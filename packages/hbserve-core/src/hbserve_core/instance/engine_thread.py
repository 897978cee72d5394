"""Thread in which an instance's engine runs, while heartbeats and transfers continue in the event loop."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from hbserve_core.engine.engine import Engine
from hbserve_core.engine.step import EngineStats, Reservation, StepOutput
from hbserve_core.errors import EngineStopped

logger = logging.getLogger(__name__)

T = TypeVar("T")
EngineEvent = StepOutput | Reservation

JOIN_TIMEOUT_S = 10.0
"""Longest wait for the thread to end. A step, or the loading of a model, cannot be interrupted, so after that the
thread is left to itself."""


class EngineThread:
    """Thread that runs commands and steps in turn and sleeps while there are none. Belongs to the event loop that ran
    `start`.

    Commands also run while a step is computed, until the next one is to be launched: see `Engine.wait_s`. If the device
    is idle, work that commands have added is launched before it is reported, because whoever receives the report would
    take the interpreter from this thread.

    The listeners are called in the event loop. `on_events` gets everything that one step has yielded in one call.
    `on_failure` is called once, when the engine cannot continue; by then every call has failed too.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        on_events: Callable[[Sequence[EngineEvent]], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._make_engine = make_engine
        self._on_events = on_events
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._pending: set[asyncio.Future[Any]] = set()
        self._answers: list[Callable[[], None]] = []
        """Calls that deliver the results of commands that have run."""
        self._ended: EngineStopped | None = None
        self.stats = EngineStats()
        """Figures as of the last step or command. May be read from any thread."""

    async def start(self) -> Engine:
        """Make the engine, in its thread.

        Raises:
            EngineStopped: `stop` was called meanwhile.
            Exception: whatever `make_engine` raised.
        """
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Future[Engine] = self._new_future()
        self._thread.start()
        return await self._made

    async def stop(self) -> None:
        """End after the step that is under way. Waiting calls fail. May be called twice, and without `start`."""
        self._end(EngineStopped("the engine was stopped"))
        self._commands.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning("the engine's thread is still busy after %s s; not waiting for it", JOIN_TIMEOUT_S)

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Run `command(engine)` between two steps, and return its result or raise its exception. Commands run in order.

        A command runs even if its caller is cancelled meanwhile.

        Raises:
            EngineStopped: the engine has failed or was stopped; the command may not have run.
        """
        answer: asyncio.Future[T] = self._new_future()

        def run(engine: Engine) -> None:
            try:
                result = command(engine)
            except BaseException as error:  # belongs to the caller
                self._answers.append(partial(_fail, answer, _as_exception(error)))
            else:
                self._answers.append(partial(_succeed, answer, result))

        self._commands.put(run)
        return await answer

    def fail(self, error: Exception) -> None:
        """End the engine as if a step had raised `error`. May be called from any thread."""

        def command(_: Engine) -> None:
            raise error

        self._commands.put(command)

    def _new_future(self) -> "asyncio.Future[Any]":
        if self._ended is not None:
            raise self._ended
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def _end(self, why: EngineStopped) -> None:
        self._ended = self._ended or why
        for future in list(self._pending):
            _fail(future, self._ended)

    # ---- in the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except BaseException as error:  # belongs to `start`
            self._tell(_fail, self._made, _as_exception(error))
            self._tell(self._end, EngineStopped(f"there is no engine: {type(error).__name__}: {error}"))
            return
        engine.on_early_output = lambda output: self._tell(self._on_events, [output])
        self.stats = engine.stats()
        self._tell(_succeed, self._made, engine)
        try:
            self._serve(engine)
        except BaseException as error:
            logger.exception("the engine failed")
            self._tell(self._end, EngineStopped(f"the engine failed: {type(error).__name__}: {error}"))
            self._tell(self._on_failure, _as_exception(error))

    def _serve(self, engine: Engine) -> None:
        while self._run_commands(engine):
            outputs = engine.step()
            self._tell_events(engine, outputs)

    def _run_commands(self, engine: Engine) -> bool:
        """Run commands that are queued or arrive before the next step must be launched. Returns False if the thread is
        to stop."""
        has_run = False
        while True:
            wait_s = engine.wait_s()
            if wait_s is None and has_run:
                return True  # a command may have ended something that others wait for
            try:
                command = self._commands.get(block=wait_s != 0, timeout=wait_s)
            except queue.Empty:
                if wait_s == 0:
                    return True
                continue
            if command is None:
                return False
            command(engine)
            has_run = True
            # Grants are reported while a step is computed, because a prefill instance waits for them.
            if not engine.launches_at_once:
                self._tell_events(engine, [])

    def _tell_events(self, engine: Engine, outputs: Sequence[StepOutput]) -> None:
        """Report the outputs of a step, the results of commands, and the reservations for which there is room now."""
        events = [*engine.poll_reservations(), *outputs]
        self.stats = engine.stats()
        answers, self._answers = self._answers, []
        if answers:
            self._tell(_call_all, answers)
        if events:
            self._tell(self._on_events, events)

    def _tell(self, listener: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(listener, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.debug("an engine event came after the loop was closed")


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _succeed(answer: "asyncio.Future[T]", result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: "asyncio.Future[T]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _as_exception(error: BaseException) -> Exception:
    """Make an exception of what is none, such as a panic of a library in Rust."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
