"""The optimizer of a job: its members stepped together, with one norm, one clip and one parameter gather."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_ads.errors import TopologyError
from megatron_ads.optim.members import ShardedMember
from megatron_ads.optim.stub import StubOptimizer
from megatron_ads.runtime.device import device

OptimizerMember = ShardedMember | StubOptimizer

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one optimizer step did; the same on every rank."""

    updated: bool
    """False if FP32 cannot hold the gradients or their squares: the weights were left alone."""
    grad_norm: float
    """Norm over all trained parameters, before clipping."""
    norm_by_kind: dict[str, float]
    """The same for each member: ``dense``, ``expert``."""
    zero_gradients: int
    """Gradient elements that are exactly 0."""
    not_finite: int = 0
    """Gradient elements that are infinite or NaN."""


class OptimizerChain:
    """Every rank holds the same kinds of members in the same order."""

    def __init__(
        self, members: Sequence[OptimizerMember], chunks: Sequence[DistributedDataParallel], *, clip_grad: float
    ) -> None:
        self.members = tuple(members)
        self._chunks = tuple(chunks)
        self._clip_grad = clip_grad

    @property
    def updates(self) -> int:
        """Updates taken so far."""
        return self.members[0].updates

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Return what ``finalize_model_grads`` left, as this rank's part of all gradients of the job; in FP32.

        Over all ranks, each trained element is there once. Valid until the next backward pass.
        """
        for member in self.members:
            member.prepare_gradients()
        return [gradient for member in self.members for gradient in member.counted_gradients()]

    @torch.no_grad()
    def step(self, learning_rate: float) -> UpdateReport:
        """Update the weights once from the gradients that ``finalize_model_grads`` left.

        Clips to the global norm over all kinds. If any gradient in the job is infinite or NaN, or so large that its
        clipping factor or its square in AdamW's second moment is not in FP32's range, nothing changes on any rank and
        no update is counted.
        """
        for member in self.members:
            member.prepare_gradients()
        statistics = torch.stack([member.reduce_statistics() for member in self.members]).tolist()
        norm = sum(row[0] for row in statistics) ** 0.5
        usable = norm < (_LARGEST if self._clip_grad > 0 else _LARGEST**0.5)  # never of a norm that is not a number
        if usable:
            if 0 < self._clip_grad < norm:
                for member in self.members:
                    member.scale_gradients(self._clip_grad / (norm + 1e-6))
            for member in self.members:
                member.update(learning_rate)
            for chunk in self._chunks:
                chunk.start_param_sync()
        return UpdateReport(
            updated=usable,
            grad_norm=norm,
            norm_by_kind={member.kind: row[0] ** 0.5 for member, row in zip(self.members, statistics, strict=True)},
            zero_gradients=int(sum(row[2] for row in statistics)),
            not_finite=int(sum(row[1] for row in statistics)),
        )

    def agreed_updates(self) -> int:
        """Return the number of updates, after every member of every rank has confirmed it.

        Raises:
            TopologyError: If two members anywhere counted differently; saving would lose one of the counts.
        """
        own = [member.updates for member in self.members]
        extremes = torch.tensor([max(own), -min(own)], dtype=torch.int64, device=device())
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        most, fewest = int(extremes[0]), -int(extremes[1])
        if most != fewest:
            raise TopologyError(
                f"optimizer members have taken between {fewest} and {most} updates (rank {dist.get_rank()}: "
                f"{', '.join(f'{member.kind} {member.updates}' for member in self.members)}). "
                "The checkpoint is not written; restart from the last one."
            )
        return most
