"""Launch times of a modelled engine's steps, chosen as in hbserve_core/engine/step_times.py with the times of a
profile."""

import math
from collections import deque

from hbserve.simulator.profile import StepLaw
from hbserve_core.engine.step_times import LATE_FROM_S, STEPS_REMEMBERED

NEEDED = 2
"""Number of slow launches among the last STEPS_REMEMBERED steps after which an engine launches earlier. It accepts that
one launch in a hundred is late, so a single slow one changes nothing."""


class ModelledLaunchTimes:
    """Chooses the launch times of one engine's steps."""

    def __init__(self, law: StepLaw, most_graph_tokens: int) -> None:
        self._law, self._most_graph_tokens = law, most_graph_tokens
        self._count, self._last_step_s = 0, 0.0
        self._mixed: deque[int] = deque(maxlen=NEEDED)
        self._eager: deque[int] = deque(maxlen=NEEDED)
        """Numbers of the last steps that had prompts beside decodes, and of the last ones without a CUDA graph."""

    def ahead_s(self, step_s: float) -> float:
        """Return how long before the end of a step of `step_s` the next one is launched. Infinite: as soon as the step
        begins."""
        law, forgotten = self._law, self._count - STEPS_REMEMBERED
        if law.overlaps and (step_s < LATE_FROM_S or law.profile.tensor_parallel_size > 1):
            return math.inf
        if len(self._eager) == NEEDED and self._eager[0] > forgotten:
            return law.launched_ahead_eager_s
        has_mixed = len(self._mixed) == NEEDED and self._mixed[0] > forgotten
        return law.launched_ahead_mixed_s if has_mixed else law.launched_ahead_s

    def idle(self) -> None:
        """Note that nothing is computed any more, so that the next step follows no other."""
        self._last_step_s = 0.0

    def ended(self, count: int, step_s: float, num_decodes: int, num_prompt_tokens: int) -> None:
        """Note that `count` steps of the same kind have ended, one after the other."""
        self._count += count
        is_eager = num_decodes + num_prompt_tokens > self._most_graph_tokens
        # A launch that takes longer than the step before it is not counted: it is late whenever it begins.
        if is_eager and self._last_step_s >= self._law.launched_ahead_eager_s:
            self._eager.append(self._count)
        elif num_decodes and num_prompt_tokens:
            self._mixed.append(self._count)
        self._last_step_s = step_s
