"""What a training objective takes and returns, and cross-entropy, the objective of supervised fine-tuning.

One record in, one record out; plain tensors, no Megatron-Core. Another objective is another file with a ``Loss``.
Shape suffixes: T = tokens of one microbatch, all its rows laid end to end; N = samples of the whole step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenValues:
    """One microbatch on the device, as the last pipeline stage has it."""

    negative_log_p_T: Tensor
    """(1, T): -log p(label), in nats, with the gradient. The only thing here that depends on the weights."""
    mask_T: Tensor
    """(1, T) float32: weight of each label, 0 where none is counted (prompts, padding)."""
    sample_T: Tensor
    """(T,) int64: number in the step of the sample that each token belongs to; 0 at padding."""
    step_samples: int
    """N."""
    normalizer: int
    """This microbatch's part of what the sum of the step is divided by."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """(1, T) each: what the batch carries besides, such as advantages or the log-probabilities of another policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossValues:
    """What an objective says of one microbatch."""

    sum: Tensor
    """Scalar with the gradient. A sum and not a mean: Megatron-Core divides the gradient by the count of the global
    batch, so that a token weighs the same whichever microbatch it is in."""
    count: int
    report: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached values by name. Those that the ``Loss`` announces are summed over the whole step; every microbatch must
    have them."""


STEP_TOTALS = ("loss_sum", "normalizer", "loss_tokens", "tokens", "samples", "stops")
"""What a step sums whatever the objective."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """An objective, and the names of what it reports, which pipeline stages without a loss need to know too."""

    compute: Callable[[TokenValues], LossValues]
    totals: tuple[str, ...] = ()
    """Reported scalars."""
    per_sample: tuple[str, ...] = ()
    """Reported values of shape (N,): one number for each sample of the step."""

    def __post_init__(self) -> None:
        names = [*STEP_TOTALS, *self.totals, *self.per_sample]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"a loss reports {', '.join(repeated)}, which would overwrite another sum of the step.")


SAMPLE_LOSSES = "sample_losses"
"""Nats over the target tokens of each sample, whatever the sample weighs."""


def cross_entropy(values: TokenValues) -> LossValues:
    """Return sum_t m_t (-log p(label_t)), with m_t the weight of label t, and the unweighted sum of each sample.

    With C the count of the global batch (target tokens, or samples that have any), the loss of a step is
    ``L = 1/C sum_t m_t (-log p(label_t))``.
    """
    loss_T, mask_T = values.negative_log_p_T, values.mask_T
    counted_T = torch.where(mask_T != 0, loss_T.detach().double(), 0.0).view(-1)
    sample_losses_N = torch.zeros(values.step_samples, dtype=torch.float64, device=loss_T.device)
    sample_losses_N.index_add_(0, values.sample_T, counted_T)
    return LossValues(
        sum=(loss_T.float() * mask_T).sum(), count=values.normalizer, report={SAMPLE_LOSSES: sample_losses_N}
    )


CROSS_ENTROPY = Loss(compute=cross_entropy, per_sample=(SAMPLE_LOSSES,))
