"""The key-value store through which the ranks of a job found each other, for what must work without collectives."""

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store


def job_store(purpose: str) -> Store:
    """Return a part of the store that only ``purpose`` uses, new at each use as long as every rank makes the same."""
    store = dist.distributed_c10d._get_default_store()
    uses = store.add(f"megatron-ads/{purpose}/uses of rank {dist.get_rank()}", 1)
    return PrefixStore(f"megatron-ads/{purpose}/{uses}", store)
