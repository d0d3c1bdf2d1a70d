"""What a checkpoint holds besides tensors, in ``common.pt`` whichever Megatron-Core wrote it.

megatron-core 0.19 puts it among the tensors instead, as a pickled object that torch reads without restriction. In a
file of its own it is read by a reader that admits plain values only, and 0.16 to 0.19 read each other's checkpoints.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict


def write_common_state(state: ShardedStateDict, folder: Path | str) -> None:
    """Take the common state out of what a save strategy is to write, and write it on rank 0; before 0.19 it is written.

    Source: ``save_common`` of megatron-core 0.16.
    """
    entry: ShardedObject | None = state.pop("common_state", None)
    if entry is not None and dist.get_rank() == 0:
        torch.save(entry.data, Path(folder) / "common.pt")
