"""What a rank writes of a checkpoint: its own memory alone, and nothing that would be unpickled freely."""

import io
import zlib
from pathlib import Path

import pytest
import torch

from megatron_ads.training.checkpoint_writer import ChecksummedFile, to_host
from parity_tests.harness.ranks import run_ranks

WHOLE = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize("part", [WHOLE, WHOLE[1], WHOLE[:, 1:], torch.zeros(1).expand(6)], ids=["all", "1", "2", "3"])
@pytest.mark.parametrize("copy", [False, True])
def test_a_part_of_a_tensor_comes_to_the_host_without_the_rest(part: torch.Tensor, copy: bool) -> None:
    taken = to_host(part, copy=copy)
    assert torch.equal(taken, part) and taken.is_contiguous() and taken.untyped_storage().nbytes() == part.nbytes
    assert (taken.data_ptr() == part.data_ptr()) == (part is WHOLE and not copy)


def test_a_checksum_is_that_of_all_that_was_written() -> None:
    raw = io.BytesIO()
    file = ChecksummedFile(raw)
    torch.save(WHOLE, file)
    file.write(b"more")
    assert (file.bytes, file.crc32) == (len(raw.getvalue()), zlib.crc32(raw.getvalue()))


def _plan_with_a_common_object(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Save as megatron-core 0.19 does; return the common state in its file, and the keys in the rank's."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_ads.training.checkpoint_writer import PlannedSave

    strategy = PlannedSave(staged=False)
    common = ShardedObject("common_state", {"step": 3}, (1,), (0,), replica_id=0)
    state = {"weight": ShardedTensor.from_rank_offsets("weight", WHOLE), "common_state": common}
    strategy.save(state, str(folder))
    keys = [item[0] for item in strategy.writer.write().items]
    return torch.load(folder / "common.pt", weights_only=True), keys


def test_the_common_state_is_a_file_of_plain_values_and_not_among_the_tensors(tmp_path: Path) -> None:
    assert run_ranks(1, _plan_with_a_common_object, tmp_path) == [({"step": 3}, ["weight"])]
