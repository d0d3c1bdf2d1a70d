"""The optimizer's part of a distributed checkpoint, in a form that does not depend on the layout.

For every trained parameter there is ``optimizer.state.<moment>.<model key>``, of the parameter's own shape: the keys
and shapes of Megatron's ``fully_reshardable`` format without its ``chained_N.`` prefixes, which depend on whether ep
is 1. The count of updates is one number for the whole job.

The moments lie in gradient-buffer buckets, divided over the replicas without regard to where a parameter begins. Each
replica writes and reads what it holds, as rectangular pieces of the tensors in the checkpoint, which are views of the
optimizer's memory: nothing is gathered or copied, and one piece at a time is on its way to or from the disk. Megatron's
own format gathers whole buckets on one replica, and cuts the joined, unpadded buckets at padded offsets, which mixes up
parameters as soon as there are two (Megatron-LM #5077, 0.16 to 0.19.2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_ads.errors import CheckpointError
from megatron_ads.optim.adam import MOMENTS
from megatron_ads.optim.chain import OptimizerChain
from megatron_ads.optim.members import ShardedMember

MASTER = "param"
"""FP32 master copy; saved only where the model's own weights are not FP32."""
PIECE = 1 << 26
"""Most elements of a piece, 256 MiB in FP32: what a save or a load of optimizer state holds in the host's memory."""

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and size along every dimension."""


def sharded_optimizer_state(
    chain: OptimizerChain, model_state: dict[str, Any], *, loading: bool
) -> dict[str, ShardedTensor]:
    """Describe this replica's share of the optimizer's state for ``megatron.core.dist_checkpointing``.

    ``model_state`` is the model's sharded state dict, whose entries hold the parameters themselves. The tensors are
    views of the optimizer's own, into which a checkpoint is loaded in place; moments that are not there before the
    first update are saved as zeros, and made when ``loading``.
    """
    entries = extract_sharded_tensors_and_factories(model_state)[0]
    by_parameter = {id(entry.data): entry for entry in nested_values(entries)}
    pieces: list[ShardedTensor] = []
    for member in (each for each in chain.members if isinstance(each, ShardedMember)):
        for parameter, first in _shares(member):
            entry = by_parameter.get(id(parameter))
            if entry is None:
                raise CheckpointError("a trained parameter is missing from the model's sharded state dict.")
            for key in MOMENTS if parameter.dtype is torch.float32 else (*MOMENTS, MASTER):
                values = _values(member, parameter, key, loading=loading)
                pieces += _pieces(replace(entry, key=f"optimizer.state.{key}.{entry.key}"), values, first)
    return {str(number): piece for number, piece in enumerate(pieces)}


def set_updates(chain: OptimizerChain, updates: int) -> None:
    """Set the count of updates everywhere it is kept."""
    for member in chain.members:
        member.updates = updates
        if isinstance(member, ShardedMember):
            for group in member.groups:
                group["step"] = updates


def _shares(member: ShardedMember) -> Iterator[tuple[Tensor, int]]:
    """Yield every parameter of which this replica has a share, with the number of the share's first element."""
    for ranges in member.inner.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, share in bucket["param_map"].items():
                    yield parameter, share["param"].start


def _values(member: ShardedMember, parameter: Tensor, key: str, *, loading: bool) -> Tensor:
    """Return this replica's consecutive elements of a parameter's moment or master copy, flat."""
    group, order = member.inner.model_param_group_index_map[parameter]
    shard = member.groups[group]["params"][order]
    if key == MASTER:
        return shard.detach()
    state = member.inner.optimizer.state[shard]
    if key in state:
        return state[key]
    if not loading:
        return torch.zeros(1, dtype=member.moment_dtype, device=shard.device).expand(shard.numel())
    state[key] = torch.zeros_like(shard.detach(), dtype=member.moment_dtype)
    return state[key]


def _pieces(entry: Any, values: Tensor, first: int) -> Iterator[ShardedTensor]:
    """Cut ``values``, a parameter's elements from number ``first`` on, into pieces of what the format stores of it."""
    shape = tuple(entry.data.shape)
    stored = _stored_tensors(entry)
    done = 0
    for begin, size in blocks(shape, first, first + values.numel()):
        block = values[done : done + prod(size)].view(size)
        done += block.numel()
        for tensor, place in stored:
            low = [max(pair) for pair in zip(begin, place, strict=True)]
            ends = zip(begin, size, place, tensor.local_shape, strict=True)
            high = [min(a + length, b + extent) for a, length, b, extent in ends]
            if all(a < b for a, b in zip(low, high, strict=True)):
                inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))
                yield _piece(tensor, block[inside], [a - b for a, b in zip(low, place, strict=True)])


def _piece(tensor: ShardedTensor, data: Tensor, offset: Sequence[int]) -> ShardedTensor:
    """Describe ``data`` as the part of ``tensor`` that begins at ``offset`` of it; each is on one replica only."""
    added = tensor.prepend_axis_num
    data = data[(None,) * added]
    inner = tuple(a + b for a, b in zip(tensor.global_offset[added:], offset, strict=True))
    return ShardedTensor(
        key=tensor.key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=tensor.global_shape,
        global_offset=tensor.global_offset[:added] + inner,
        axis_fragmentations=None,  # no regular grid
        replica_id=(*tensor.replica_id[:2], 0),
    )


def _stored_tensors(entry: Any) -> list[tuple[ShardedTensor, tuple[int, ...]]]:
    """Return the tensors that the format stores a parameter as, and where in the parameter each begins.

    One, or what a factory cuts it into (gate and up), seen at a parameter without memory.
    """
    if isinstance(entry, ShardedTensor):
        return [(entry, (0,) * entry.data.dim())]
    whole = torch.empty(entry.data.shape, device="meta")
    found = []
    for tensor in nested_values({"": replace(entry, data=whole).build()}):
        assert tensor.data.stride() == whole.stride(), f"{entry.key} is stored as something else than parts of it"
        place, rest = [], tensor.data.storage_offset()
        for stride in whole.stride():
            index, rest = divmod(rest, stride)
            place.append(index)
        found.append((tensor, tuple(place)))
    return found


def blocks(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Block]:
    """Cut elements ``begin`` to ``end`` of a row-major array into blocks of at most ``PIECE``, in their order."""
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    while begin < end:
        index, within = divmod(begin, row)
        rows = min((end - begin) // row, PIECE // row)
        if within == 0 and rows:
            yield (index, *(0 for _ in shape[1:])), (rows, *shape[1:])
            begin += rows * row
            continue
        stop = min(end, (index + 1) * row)
        for offset, size in blocks(shape[1:], within, stop - index * row):
            yield (index, *offset), (1, *size)
        begin = stop
