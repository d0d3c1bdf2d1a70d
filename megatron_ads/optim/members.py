"""One optimizer per kind of parameter: Megatron's distributed optimizer, reduced to what each step needs.

A job's optimizer is a chain of members, the same kinds in the same order on every rank. Each member takes part in the
same collectives wherever it is, so a rank without parameters of a kind has a stub in that place.
"""

from collections.abc import Sequence

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from megatron_ads.runtime.device import device

DENSE = "dense"
"""Everything that is replicated over data-parallel ranks: attention, dense and shared feed-forward, embeddings."""
EXPERT = "expert"
"""Routed experts spread over expert-parallel ranks; each is replicated over the expert-data-parallel ranks only."""


class ShardedMember:
    """The member of a rank that owns parameters of ``kind``, around Megatron's ``DistributedOptimizer``.

    ``updates`` counts the optimizer steps taken, empty or not.
    """

    def __init__(
        self,
        kind: str,
        inner: DistributedOptimizer,
        *,
        tensor_group: ProcessGroup,
        group_keys: tuple[tuple[str, int], ...],
    ) -> None:
        self.kind = kind
        self.inner = inner
        self.updates = 0
        self._group_keys = group_keys
        self._tensor_group = tensor_group

    @property
    def groups(self) -> list[dict]:
        """The parameter groups, holding this data-parallel rank's FP32 shards."""
        return self.inner.optimizer.param_groups

    @property
    def moment_dtype(self) -> torch.dtype:
        """Of both moments, as ``optim.moments`` says, in a checkpoint too."""
        return getattr(self.inner.optimizer, "exp_avg_dtype", torch.float32)  # apex's have no choice

    def prepare_gradients(self) -> None:
        """Bring this rank's reduced gradients into the optimizer's FP32 shards."""
        self.inner.prepare_grads()

    def reduce_statistics(self) -> Tensor:
        """Return ``gradient_statistics`` of all gradients of this kind in the job; one all-reduce over all ranks."""
        statistics = gradient_statistics(self.counted_gradients())
        all_reduce(statistics)
        return statistics

    def counted_gradients(self) -> list[Tensor]:
        """Return this rank's gradients, without those that another rank counts; over all ranks, each element once."""
        return [grad for shard, grad in self._gradients() if self._counts(shard)]

    def scale_gradients(self, factor: float) -> None:
        """Multiply this rank's gradients, to clip them."""
        torch._foreach_mul_([grad for _, grad in self._gradients()], factor)

    def update(self, learning_rate: float) -> None:
        """Take one optimizer step into the model's weights. Their all-gather is the chain's, once for all members."""
        for group in self.groups:
            group["lr"] = learning_rate
        MixedPrecisionOptimizer.step_with_ready_grads(self.inner)
        self.updates += 1

    def group_keys(self) -> tuple[tuple[str, int], ...]:
        """Return ``(group name, parameters of this rank's model in it)``, for the preflight."""
        return self._group_keys

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Return this rank's shards that have a gradient, each with it."""
        return [(shard, shard.grad) for group in self.groups for shard in group["params"] if shard.grad is not None]

    def _counts(self, shard: Tensor) -> bool:
        """Whether this rank's copy is the one that counts in a norm.

        Tensor-parallel ranks repeat what is not divided among them, and the MTP stage repeats the embedding. Experts
        are judged by the expert-tensor group, as megatron-core 0.19 does: judged by the attention's, as before, the
        experts of all but the first tensor-parallel rank would be left out (Megatron-LM #5916).
        """
        repeated = not param_is_not_tensor_parallel_duplicate(shard, tp_group=self._tensor_group)
        return not repeated and param_is_not_shared(shard)


_PIECE = 1 << 18
"""Elements that are squared at a time on a CPU: their FP64 copy stays in the cache."""


def gradient_statistics(gradients: Sequence[Tensor]) -> Tensor:
    """Return ``[sum of squares, non-finite count, zero count]`` of some gradients as three FP64 numbers.

    FP64, so that a norm is the same whichever way the gradients are divided among ranks, right at any size, and finite
    wherever the gradients are. torch's own FP32 norm on a CPU is 1.1 % too small at 1e8 elements (pytorch #68326).
    """
    if not gradients:
        return torch.zeros(3, dtype=torch.float64, device=device())
    if gradients[0].is_cuda:  # one kernel for all, which accumulates in the dtype that is asked for
        squares = torch.stack(torch._foreach_norm(list(gradients), 2, torch.float64)).square().sum()
    else:
        copy = torch.empty(_PIECE, dtype=torch.float64)  # one for all: fresh memory would cost more than the squares
        pieces = (piece for gradient in gradients for piece in gradient.flatten().split(_PIECE))
        doubles = (copy[: piece.numel()].copy_(piece) for piece in pieces)
        squares = torch.stack([torch.dot(double, double) for double in doubles]).sum()
    not_finite = torch.zeros((), dtype=torch.float64, device=device())
    if not bool(torch.isfinite(squares)):
        not_finite = torch.stack([(~torch.isfinite(gradient)).sum().double() for gradient in gradients]).sum()
    zeros = torch.stack([gradient.numel() - gradient.count_nonzero() for gradient in gradients]).sum().double()
    return torch.stack([squares, not_finite, zeros])
