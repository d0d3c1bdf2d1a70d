"""What POPO needs to know of a step: how far the gradients of its rewards agree.

    I_k = <grad L_k, sum_j grad L_j>        (Taiji, eq. 6)

L_k is the objective of the recipe, its KL term included, with the advantages of reward k alone, over all rollouts of
the step, at the weights before its first update. The gradients are of all trained parameters, and not clipped.
"""

from collections.abc import Callable, Sequence

from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.losses.loss import Loss
from megatron_ads.optim.inner_products import inner_products
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.step import run_gradients


def reward_inner_products(
    rewards: Sequence[str],
    batches_of: Callable[[str], Sequence[PackedBatch]],
    model: TrainedModel,
    loss: Loss,
    *,
    before_microbatch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return I_k by reward, the same on every rank; a collective.

    One forward and backward pass for each of K rewards; between them the host of each rank keeps K - 1 gradients, as
    ``optim.inner_products`` says. ``batches_of`` returns this rank's microbatches with the advantages of one reward.
    """
    gradients = (
        run_gradients(batches_of(name), model.chunks, model.optimizer, loss=loss, before_microbatch=before_microbatch)
        for name in rewards
    )
    return dict(zip(rewards, inner_products(gradients, len(rewards)).sum(dim=1).tolist(), strict=True))
