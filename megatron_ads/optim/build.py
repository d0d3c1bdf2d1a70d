"""Build this rank's optimizer chain over Megatron's gradient buffers."""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch.distributed import ReduceOp, all_reduce

from megatron_ads.config.model import Precision
from megatron_ads.config.training import OptimConfig
from megatron_ads.optim.adam import make_adam
from megatron_ads.optim.chain import OptimizerChain, OptimizerMember
from megatron_ads.optim.members import DENSE, EXPERT, ShardedMember
from megatron_ads.optim.one_rank import skip_collectives_of_one
from megatron_ads.optim.stub import StubOptimizer
from megatron_ads.runtime.device import device

DECAYED = "decayed"
UNDECAYED = "undecayed"
GROUP_NAMES = (DECAYED, UNDECAYED)
"""Every member has these groups on every rank, empty or not, so that checkpoints do not depend on the layout."""


def wrap_for_training(
    chunks: Sequence[torch.nn.Module], *, overlap: bool, bucket_size: int | None = None
) -> list[DistributedDataParallel]:
    """Give each chunk Megatron's gradient buffers: FP32 accumulation, reduce-scatter over the replicas.

    ``overlap`` reduces gradients during the backward pass, in buckets of ``bucket_size`` elements (None: Megatron's
    default); without it each buffer is one bucket.
    """
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        bucket_size=bucket_size,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    skip_collectives_of_one(wrapped)
    return wrapped


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    settings: OptimConfig,
    precision: Precision,
    *,
    has_expert_member: bool,
    stub_experts: bool = True,
) -> OptimizerChain:
    """Build the chain: a dense member and, with ``has_expert_member``, one for the routed experts.

    ``has_expert_member`` must be the same on all ranks (``trains_experts_anywhere``). A rank that trains nothing of a
    kind gets a ``StubOptimizer`` in its place. ``stub_experts=False`` leaves the experts' place empty, as trainers
    without a stub do; it exists to show what then happens.
    """
    dense, expert = _parameters_by_kind(chunks)
    members: list[OptimizerMember] = [
        _sharded_member(DENSE, dense, chunks, settings, precision) if dense else StubOptimizer(DENSE, GROUP_NAMES)
    ]
    if has_expert_member and expert:
        members.append(_sharded_member(EXPERT, expert, chunks, settings, precision))
    elif has_expert_member and stub_experts:
        members.append(StubOptimizer(EXPERT, GROUP_NAMES))
    return OptimizerChain(members, chunks, clip_grad=settings.clip_grad)


def trains_experts_anywhere(chunks: Sequence[DistributedDataParallel]) -> bool:
    """Whether any rank of the job has parameters for the expert member; a collective, the same answer everywhere."""
    here = torch.tensor(float(bool(_parameters_by_kind(chunks)[1])), device=device())
    all_reduce(here, op=ReduceOp.MAX)
    return bool(here)


Named = list[tuple[str, torch.nn.Parameter]]


def _parameters_by_kind(chunks: Sequence[DistributedDataParallel]) -> tuple[Named, Named]:
    """Divide the trained parameters as Megatron's buffers do: by whether the data-parallel group reduces them."""
    trained = [
        (name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters() if parameter.requires_grad
    ]
    dense = [(name, parameter) for name, parameter in trained if getattr(parameter, "allreduce", True)]
    expert = [(name, parameter) for name, parameter in trained if not getattr(parameter, "allreduce", True)]
    return dense, expert


def is_decayed(name: str, parameter: torch.nn.Parameter) -> bool:
    """Weight decay applies to matrices: not to norms, and not to biases."""
    return parameter.dim() > 1 and not name.endswith(".bias")


def _sharded_member(
    kind: str,
    parameters: Named,
    chunks: Sequence[DistributedDataParallel],
    settings: OptimConfig,
    precision: Precision,
) -> ShardedMember:
    if kind == EXPERT:
        replicas = parallel_state.get_expert_data_parallel_group()
        tensor_group = parallel_state.get_expert_tensor_parallel_group()
        buffers = {index: chunk.expert_parallel_buffers for index, chunk in enumerate(chunks)}
    else:
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        buffers = {index: chunk.buffers for index, chunk in enumerate(chunks)}
    adam = _adam(parameters, settings)
    group_keys = tuple((group["name"], len(group["params"])) for group in adam.param_groups)  # before they are divided
    bf16 = precision is Precision.bf16
    upstream = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        use_distributed_optimizer=True,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        clip_grad=settings.clip_grad,
    )
    inner = DistributedOptimizer(
        adam,
        upstream,
        grad_scaler=None,
        init_state_fn=None,
        model_chunks=list(chunks),
        per_model_buffers=buffers,
        data_parallel_group=replicas,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )
    return ShardedMember(kind, inner, tensor_group=tensor_group, group_keys=group_keys)


def _adam(parameters: Named, settings: OptimConfig) -> torch.optim.Optimizer:
    decayed = [parameter for name, parameter in parameters if is_decayed(name, parameter)]
    undecayed = [parameter for name, parameter in parameters if not is_decayed(name, parameter)]
    groups = [
        {"params": decayed, "name": DECAYED, "weight_decay": settings.weight_decay},
        {"params": undecayed, "name": UNDECAYED, "weight_decay": 0.0},
    ]
    return make_adam(groups, settings)
