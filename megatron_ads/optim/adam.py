"""The update rule of one step: its learning rate, and AdamW with FusedAdam's conventions.

AdamW is for machines with neither Transformer Engine nor apex, whose ``FusedAdam`` keep one ``step`` per parameter
group; torch's AdamW keeps one per parameter. With the group convention everywhere, a checkpoint is the same whichever
of the three wrote it. The learning rate is a pure function of the step: nothing to save, nothing to lose on a resume.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from megatron_ads.config.training import OptimConfig, Schedule

MOMENTS = ("exp_avg", "exp_avg_sq")


class GroupStepAdamW(torch.optim.AdamW):
    """Decoupled AdamW (arXiv:1711.05101) whose groups count the steps.

    An empty group counts its steps too: a rank that owns no parameter of a group must agree with its peers on how
    many updates the group has seen, or bias correction restarts after a resume.

    Derived from torch's class only because Megatron-Core's ``DistributedOptimizer`` accepts no other.
    """

    def __init__(self, params: Any, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state without a step per parameter, which torch's AdamW would demand here."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; count one step in every group."""
        if closure is not None:
            raise TypeError("GroupStepAdamW.step takes no closure; compute the gradients before the call.")
        for group in self.param_groups:
            done = group.get("step", 0)
            self._update(group, done)
            group["step"] = done + 1

    def _update(self, group: dict[str, Any], done: int) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update((name, torch.zeros_like(parameter)) for name in MOMENTS)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [torch.tensor(float(done), device=parameter.device) for parameter in parameters],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def adam_class() -> Any:
    """Return Transformer Engine's FusedAdam where it is installed, else apex's, else ours."""
    try:
        from transformer_engine.pytorch.optimizers import FusedAdam
    except ImportError:
        try:
            from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
        except ImportError:
            return GroupStepAdamW
    return FusedAdam


@dataclass(frozen=True, slots=True)
class LearningRateSchedule:
    """Linear warm-up to the highest rate, then cosine, linear or no decay to the lowest at the last step."""

    settings: OptimConfig
    total_steps: int

    def at(self, step: int) -> float:
        """Return the learning rate of update number ``step``, counted from 0.

        Warm-up reaches the peak at update ``warmup_steps``; its first update already moves, at
        ``peak / (warmup_steps + 1)``. The last update, ``total_steps - 1``, runs at the lowest rate.
        """
        peak, floor, warmup = self.settings.learning_rate, self.settings.min_learning_rate, self.settings.warmup_steps
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        if self.settings.schedule is Schedule.constant:
            return peak
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - 1 - warmup))
        linear = self.settings.schedule is Schedule.linear
        remaining = 1.0 - progress if linear else (1.0 + math.cos(math.pi * progress)) / 2
        return floor + (peak - floor) * remaining
