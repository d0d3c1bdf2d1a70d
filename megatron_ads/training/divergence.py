"""A job that learns nothing any more must not end as a success: skipped updates, and weights that are no numbers."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ads.errors import DivergedError
from megatron_ads.observability.log import get_logger
from megatron_ads.runtime.device import device
from megatron_ads.training.step import StepReport

logger = get_logger(__name__)

_ADVICE = (
    "Look at the loss and grad_norm before in metrics.jsonl; lower optim.learning_rate, set optim.clip_grad, or look "
    "for extreme weights of rows, and continue from a checkpoint before."
)


@dataclass(kw_only=True, slots=True)
class SkippedUpdates:
    """Counts the updates that this process saw skipped; the same on every rank."""

    maximum: int
    """Consecutive ones after which the job has diverged."""
    consecutive: int = 0
    count: int = 0

    def observe(self, step: int, report: StepReport) -> None:
        """Take in one step.

        Raises:
            DivergedError: If it is the last of too many.
        """
        update = report.update
        assert update is not None
        if update.updated:
            self.consecutive = 0
            return
        self.consecutive += 1
        self.count += 1
        if self.consecutive >= self.maximum:
            raise DivergedError(
                f"the job has diverged: {self.consecutive} consecutive updates were skipped, up to step {step} (loss "
                f"{report.loss:g}, gradient norm {update.grad_norm:g}; train.max_skipped_updates). Nothing is "
                f"exported. {_ADVICE}"
            )
        # The first 8 have a line each; later ones only where their number is a power of two.
        if dist.get_rank() == 0 and (self.count <= 8 or self.count.bit_count() == 1):
            logger.warning(
                "step %d: the update is skipped, the weights stay as they were: loss %g, gradient norm %g, %d gradient "
                "elements not finite; %d in a row, of at most %d",
                step, report.loss, update.grad_norm, update.not_finite, self.consecutive, self.maximum,
            )  # fmt: skip


def require_finite(models: Iterable[torch.nn.Module]) -> None:
    """Refuse weights that are not all finite; a collective.

    Raises:
        DivergedError: On every rank, if any rank has such a weight.
    """
    spoilt = sum(not bool(torch.isfinite(weight).all()) for model in models for weight in model.parameters())
    total = torch.tensor(float(spoilt), device=device())
    dist.all_reduce(total)
    if total:
        raise DivergedError(
            f"the job has diverged: {int(total)} of the ranks' parameters hold numbers that are not finite. Nothing is "
            f"exported. {_ADVICE}"
        )
