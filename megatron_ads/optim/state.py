"""The optimizer's part of a distributed checkpoint, in a form that does not depend on the layout.

For every trained parameter there is ``optimizer.state.<moment>.<model key>``, of the parameter's own shape: the keys
and shapes of Megatron's ``fully_reshardable`` format without its ``chained_N.`` prefixes, which depend on whether ep
is 1. The count of updates is one number for the whole job.

The moments lie in gradient-buffer buckets, divided over the replicas with padding between buckets. Each bucket is
gathered and cut at its own offsets; Megatron's own format cuts the joined, unpadded buckets at padded offsets and so
mixes up parameters as soon as there are two buckets (Megatron-LM #5077, 0.16 to 0.19.2).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_ads.errors import CheckpointError
from megatron_ads.optim.adam import MOMENTS
from megatron_ads.optim.chain import OptimizerChain
from megatron_ads.optim.members import ShardedMember

MASTER = "param"
"""FP32 master copy; saved only where the model's own weights are not FP32."""


def sharded_optimizer_state(chain: OptimizerChain, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """Describe the optimizer's state for ``megatron.core.dist_checkpointing``.

    ``model_state`` is the model's sharded state dict, whose entries hold the parameters themselves. A collective over
    the replicas of every bucket, unless ``loading``, when the tensors are empty and of the right shapes.
    """
    tensors: dict[str, Any] = {}
    entries = extract_sharded_tensors_and_factories(model_state)[0]
    by_parameter = {id(entry.data): entry for entry in nested_values(entries)}
    for member in _sharded_members(chain):
        for parameter, values in _whole_states(member, loading=loading):
            entry = by_parameter.get(id(parameter))
            if entry is None:
                raise CheckpointError("a trained parameter is missing from the model's sharded state dict.")
            for key, value in values.items():
                name = f"optimizer.state.{key}.{entry.key}"
                dtype = {"dtype": value.dtype} if hasattr(entry, "dtype") else {}
                tensors[str(len(tensors))] = replace(entry, key=name, data=value, **dtype)
    return tensors


def load_optimizer_state(chain: OptimizerChain, loaded: dict[str, Tensor], *, updates: int) -> None:
    """Copy this rank's share of ``loaded`` (whole tensors, keyed as requested) into the optimizer; set the count."""
    numbers = count()
    for member in _sharded_members(chain):
        for buffer in member.inner.buffers:
            for bucket in buffer.buckets:
                for parameter in bucket.params_list:
                    _fill_shard(member, parameter, {key: loaded[str(next(numbers))] for key in _keys(buffer)})
    for each in chain.members:
        each.updates = updates
        if isinstance(each, ShardedMember):
            for group in each.groups:
                group["step"] = updates


def _sharded_members(chain: OptimizerChain) -> list[ShardedMember]:
    return [member for member in chain.members if isinstance(member, ShardedMember)]


def _keys(buffer: Any) -> tuple[str, ...]:
    return MOMENTS if buffer.param_dtype is torch.float32 else (*MOMENTS, MASTER)


def _shard(member: ShardedMember, parameter: Tensor) -> Tensor:
    group, order = member.inner.model_param_group_index_map[parameter]
    return member.groups[group]["params"][order]


def _fill_shard(member: ShardedMember, parameter: Tensor, whole: dict[str, Tensor]) -> None:
    """Take this replica's share of a parameter's state, if it has any."""
    if parameter not in member.inner.model_param_gbuf_map:
        return
    buffer_index, dtype, bucket_index = member.inner.model_param_gbuf_map[parameter]
    share = member.inner.gbuf_ranges[buffer_index][dtype][bucket_index]["param_map"][parameter]["param"]
    shard = _shard(member, parameter)
    for key, value in whole.items():
        piece = value.flatten()[share.start : share.end].to(shard.device)
        if key == MASTER:
            shard.data.copy_(piece)
        else:
            member.inner.optimizer.state[shard][key] = piece.to(torch.float32, copy=True)


def _whole_states(member: ShardedMember, *, loading: bool) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield each parameter with its state as whole tensors of its shape, on the CPU, gathered bucket by bucket."""
    for buffer_index, buffer in enumerate(member.inner.buffers):
        for bucket_index, bucket in enumerate(buffer.buckets):
            if loading:
                for parameter in bucket.params_list:
                    yield parameter, {key: torch.empty(parameter.shape, dtype=torch.float32) for key in _keys(buffer)}
                continue
            gathered = {key: _gather_bucket(member, buffer_index, bucket_index, key) for key in _keys(buffer)}
            for parameter in bucket.params_list:
                start, end, _ = buffer.param_index_map[parameter]
                start, end = start - bucket.offset, end - bucket.offset
                yield parameter, {key: flat[start:end].view(parameter.shape) for key, flat in gathered.items()}


def _gather_bucket(member: ShardedMember, buffer_index: int, bucket_index: int, key: str) -> Tensor:
    """Return one moment of a whole bucket, padding included, flat and on the CPU."""
    buffer = member.inner.buffers[buffer_index]
    bucket = buffer.buckets[bucket_index]
    replicas = member.inner.data_parallel_group
    own = torch.zeros(bucket.grad_data.numel() // replicas.size(), dtype=torch.float32, device=bucket.grad_data.device)
    ranges = next(iter(member.inner.gbuf_ranges[buffer_index].values()))[bucket_index]["param_map"]
    for parameter, share in ranges.items():
        shard = _shard(member, parameter)
        value = shard if key == MASTER else member.inner.optimizer.state[shard].get(key)
        if value is not None:  # no moments before the first update
            own[share["gbuf_local"].start : share["gbuf_local"].end].copy_(value)
    if replicas.size() == 1:
        return own.cpu()
    whole = torch.empty(bucket.grad_data.numel(), dtype=torch.float32, device=own.device)
    dist.all_gather_into_tensor(whole, own, group=replicas)
    return whole.cpu()
