"""``optim``: AdamW and the course of its learning rate."""

import math
from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from megatron_ads.config.checks import require, require_at_least


class Schedule(StrEnum):
    """Course of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) and the course of its learning rate."""

    learning_rate: float = MISSING
    """Highest learning rate, reached after the warm-up."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step."""
    schedule: Schedule = Schedule.cosine
    """From the highest to the lowest learning rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 is off."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_at_least("optim", self, 0, "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay")
        require_at_least("optim", self, 0, "clip_grad")
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"optim.{name} is {value}; it must be above 0.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} is {value}; it must be at least 0 and below 1.")
        if self.schedule is Schedule.constant:
            require(
                self.min_learning_rate == 0,
                f"optim.min_learning_rate is {self.min_learning_rate:g}, which has no effect with optim.schedule "
                "constant. Remove it, or choose cosine or linear.",
            )
        require(
            self.min_learning_rate <= self.learning_rate,
            f"optim.min_learning_rate {self.min_learning_rate:g} is above optim.learning_rate {self.learning_rate:g}.",
        )
