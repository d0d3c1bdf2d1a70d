"""Leave out the gradient and parameter collectives of replica groups that have one rank."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel


def skip_collectives_of_one(chunks: Sequence[DistributedDataParallel]) -> None:
    """Let buffers whose replica group is this rank alone stay as they are.

    gloo carries out a reduce-scatter or all-gather over one rank as copies of the whole buffer: up to a sixth of a
    step of one process. For synchronous reduction only (``overlap_grad_reduce=False``); NCCL does nothing in place.
    """
    for chunk in chunks:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if group.intra_distributed_optimizer_instance_size == 1 and not group.ddp_config.overlap_grad_reduce:
                group.start_grad_sync = _scale_only(group)
                group.start_param_sync = _do_nothing


def _scale_only(group: Any) -> Callable[..., None]:
    """What Megatron does to the gradients before it sends them."""

    def start_grad_sync(force_all_reduce: bool = False) -> None:
        for bucket in group.buckets:
            if bucket.gradient_scaling_factor != 1.0:
                bucket.grad_data *= bucket.gradient_scaling_factor

    return start_grad_sync


def _do_nothing(force_sync: bool = False) -> None:
    """The one shard is the parameters themselves."""
