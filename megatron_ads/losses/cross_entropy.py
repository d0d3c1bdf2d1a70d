"""Cross-entropy, the objective of supervised fine-tuning.

With m_t the weight of label t and C the count of the global batch (target tokens, or samples that have any),

    L = 1/C sum_t m_t (-log p(label_t)).
"""

import torch

from megatron_ads.losses.loss import Loss, LossValues, TokenValues

SAMPLE_LOSSES = "sample_losses"
"""Nats over the target tokens of each sample, whatever the sample weighs."""


def cross_entropy(values: TokenValues) -> LossValues:
    """Return sum_t m_t (-log p(label_t)), and the unweighted sum of each sample."""
    loss_T, mask_T = values.negative_log_p_T, values.mask_T
    counted_T = torch.where(mask_T != 0, loss_T.detach().double(), 0.0).view(-1)
    sample_losses_N = torch.zeros(values.step_samples, dtype=torch.float64, device=loss_T.device)
    sample_losses_N.index_add_(0, values.sample_T, counted_T)
    return LossValues(
        sum=(loss_T.float() * mask_T).sum(), count=values.normalizer, report={SAMPLE_LOSSES: sample_losses_N}
    )


CROSS_ENTROPY = Loss(compute=cross_entropy, per_sample=(SAMPLE_LOSSES,))
