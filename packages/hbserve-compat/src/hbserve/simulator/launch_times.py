"""The moments at which a modelled engine launches its steps: as hbserve_core/engine/step_times.py chooses them, by a
profile."""

import math
from collections import deque

from hbserve.simulator.profile import StepLaw
from hbserve_core.engine.step_times import LATE_FROM_S, STEPS_REMEMBERED

NEEDED = 2
"""It may be late in a hundredth of them, so one that takes the host longer than the others changes nothing."""


class ModelledLaunchTimes:
    """Of one engine."""

    def __init__(self, law: StepLaw, most_graph_tokens: int) -> None:
        self._law, self._most_graph_tokens = law, most_graph_tokens
        self._count, self._last_step_s = 0, 0.0
        self._mixed: deque[int] = deque(maxlen=NEEDED)
        self._eager: deque[int] = deque(maxlen=NEEDED)
        """Numbers of the last steps with prompts beside decodes, and of those without a CUDA graph."""

    def ahead_s(self, step_s: float) -> float:
        """So long before the end of a step that takes so long the next one is launched; as long as it takes if it is
        followed at once."""
        law, forgotten = self._law, self._count - STEPS_REMEMBERED
        if law.overlaps and (step_s < LATE_FROM_S or law.profile.tensor_parallel_size > 1):
            return math.inf
        if len(self._eager) == NEEDED and self._eager[0] > forgotten:
            return law.launched_ahead_eager_s
        has_mixed = len(self._mixed) == NEEDED and self._mixed[0] > forgotten
        return law.launched_ahead_mixed_s if has_mixed else law.launched_ahead_s

    def idle(self) -> None:
        """The next step is launched behind no other."""
        self._last_step_s = 0.0

    def ended(self, count: int, step_s: float, num_decodes: int, num_prompt_tokens: int) -> None:
        """So many steps of one kind have ended, one after the other."""
        self._count += count
        is_eager = num_decodes + num_prompt_tokens > self._most_graph_tokens
        # A launch that takes longer than the step before it is late whenever it begins, and not counted.
        if is_eager and self._last_step_s >= self._law.launched_ahead_eager_s:
            self._eager.append(self._count)
        elif num_decodes and num_prompt_tokens:
            self._mixed.append(self._count)
        self._last_step_s = step_s
