"""Learning rate as a pure function of the step: nothing to save, nothing to lose on a resume."""

import math
from dataclasses import dataclass

from megatron_ads.config.training import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateSchedule:
    """Linear warm-up to ``peak``, then cosine, linear or no decay to ``floor`` at the last step."""

    peak: float
    floor: float
    warmup_steps: int
    total_steps: int
    shape: Schedule

    def at(self, step: int) -> float:
        """Return the learning rate of update number ``step``, counted from 0.

        Warm-up reaches ``peak`` at update ``warmup_steps``; its first update already moves, at
        ``peak / (warmup_steps + 1)``. The last update, ``total_steps - 1``, runs at ``floor``.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.shape is Schedule.constant:
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps))
        remaining = 1.0 - progress if self.shape is Schedule.linear else (1.0 + math.cos(math.pi * progress)) / 2
        return self.floor + (self.peak - self.floor) * remaining
