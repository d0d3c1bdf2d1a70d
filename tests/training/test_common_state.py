"""The common state of a checkpoint as the save strategies of megatron-core 0.19 get it, and of the versions before."""

from pathlib import Path
from typing import Any

import torch

from parity_tests.harness.ranks import run_ranks


def _write(folder: Path, has_common_state: bool) -> list[str]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_ads.training.common_state import write_common_state

    rank = torch.distributed.get_rank()
    state: dict[str, Any] = {"weight": torch.zeros(1)}
    if has_common_state:
        state["common_state"] = ShardedObject("common_state", {"training": {"step": 3}}, (1,), (0,), rank)
    write_common_state(state, folder)
    torch.distributed.barrier()
    return list(state)


def test_rank_0_writes_the_common_state_to_a_file_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(2, _write, tmp_path, True) == [["weight"]] * 2
    assert torch.load(tmp_path / "common.pt", weights_only=True) == {"training": {"step": 3}}


def test_nothing_is_written_where_megatron_core_has_written_it(tmp_path: Path) -> None:
    assert run_ranks(2, _write, tmp_path, False) == [["weight"]] * 2
    assert not list(tmp_path.iterdir())
