"""The update rule of one step: its learning rate, and AdamW with FusedAdam's conventions.

AdamW is for machines with neither Transformer Engine nor apex, whose ``FusedAdam`` keep one ``step`` per parameter
group; torch's AdamW keeps one per parameter. With the group convention everywhere, a checkpoint is the same whichever
of the three wrote it. The learning rate is a pure function of the step: nothing to save, nothing to lose on a resume.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_ads.config.model import Precision
from megatron_ads.config.training import OptimConfig, Schedule
from megatron_ads.runtime.device import transformer_engine_fault

MOMENTS = ("exp_avg", "exp_avg_sq")


class GroupStepAdamW(torch.optim.AdamW):
    """Decoupled AdamW (arXiv:1711.05101) whose groups count the steps.

    An empty group counts its steps too: a rank that owns no parameter of a group must agree with its peers on how
    many updates the group has seen, or bias correction restarts after a resume.

    Derived from torch's class only because Megatron-Core's ``DistributedOptimizer`` accepts no other.
    """

    def __init__(
        self,
        params: Any,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay)
        self.exp_avg_dtype = moments  # FusedAdam's name

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
                moments = ((name, torch.zeros_like(parameter, dtype=self.exp_avg_dtype)) for name in MOMENTS)
                self.state[parameter].update(moments)
        tensors = [
            (parameter, parameter.grad, *(self.state[parameter][name] for name in MOMENTS)) for parameter in parameters
        ]
        if self.exp_avg_dtype is torch.float32:
            _adamw(group, done, tensors)
            return
        for one in tensors:
            for piece in zip(*(tensor.view(-1).split(_PIECE) for tensor in one), strict=True):
                _adamw_widened(group, done, *piece)


_PIECE = 1 << 26
"""Elements whose moments are in FP32 at a time: 0.5 GB."""


def _adamw_widened(group: dict[str, Any], done: int, parameter: Tensor, grad: Tensor, *moments: Tensor) -> None:
    wide = [moment.float() for moment in moments]
    _adamw(group, done, [(parameter, grad, *wide)])
    for moment, updated in zip(moments, wide, strict=True):
        moment.copy_(updated)


def _adamw(group: dict[str, Any], done: int, tensors: Sequence[tuple[Tensor, ...]]) -> None:
    """Update in place; each entry is a parameter, its gradient, and its two moments."""
    parameters, grads, averages, squares = map(list, zip(*tensors, strict=True))
    adamw(
        parameters,
        grads,
        averages,
        squares,
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


def make_adam(groups: Any, settings: OptimConfig) -> torch.optim.Optimizer:
    """Return Transformer Engine's FusedAdam where it runs, else apex's, else ours; apex's has FP32 moments only."""
    options: dict[str, Any] = {
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    narrow = settings.moments is Precision.bf16
    if transformer_engine_fault() is None:
        from transformer_engine.pytorch.optimizers import FusedAdam

        if narrow:
            options |= dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
        return FusedAdam(groups, **options)
    if not narrow and torch.cuda.is_available():
        try:
            from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
        except ImportError:
            pass
        else:
            return FusedAdam(groups, **options)
    return GroupStepAdamW(groups, **options, moments=torch.bfloat16 if narrow else torch.float32)


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
