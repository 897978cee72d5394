"""Steps of all ranks of an instance by their number, so that what is told of one means each rank's own event of it."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

KEPT_STEPS = 4
"""Events that are kept: a rank has two steps under way at most, and those before them have been computed."""


class LaunchedStep(NamedTuple):
    """A step of all ranks, before it has been computed."""

    number: int
    """From 1, since the instance began: the same on every rank."""
    computed: Any
    """Rank 0's CUDA event, see `Runner.computed`. Each rank has one of its own for the step of this number."""


class LaunchedSteps:
    """Events of the steps that this rank has launched, by number. Of its engine's thread and of the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._events: deque[Any] = deque(maxlen=KEPT_STEPS)
        self._waiting: list[tuple[int, Callable[[], object]]] = []

    def add(self, computed: Any) -> None:
        """The next step is launched; `computed` as a Runner has it."""
        with self._lock:
            self._number += 1
            self._events.append(computed)
            due = [call for number, call in self._waiting if number <= self._number]
            self._waiting = [each for each in self._waiting if each[0] > self._number]
        for call in due:
            call()

    def event(self, number: int) -> Any:
        """The event of a launched step; None: it has been computed."""
        with self._lock:
            age = self._number - number
            return self._events[-1 - age] if 0 <= age < len(self._events) else None

    def has(self, number: int, when_launched: Callable[[], object]) -> bool:
        """Whether a step is launched. If not, this is called when it is, in whatever thread launches it."""
        with self._lock:
            if number > self._number:
                self._waiting.append((number, when_launched))
            return number <= self._number
