"""A wait that ends in an error names the rank, the operation and the group; other errors pass unchanged."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.health.activity import CommunicationError, name_failed_communication
from parity_tests.harness.ranks import RanksFailed, run_ranks

LAYOUT = ParallelLayout(world=4, pp=2, ep=2)


def _skip_an_expert_collective_on_rank_3() -> str:
    """Ranks 2 and 3 are the expert-parallel group of stage 1; rank 3 stays away."""
    process_groups.start(LAYOUT, timeout_seconds=2)
    from megatron.core import parallel_state

    if dist.get_rank() == 2:
        with pytest.raises(CommunicationError) as caught, name_failed_communication(LAYOUT):
            dist.all_reduce(torch.ones(3), group=parallel_state.get_expert_model_parallel_group())
        return str(caught.value)
    time.sleep(3)
    return ""


def test_a_timeout_names_coordinates_operation_group_and_peers() -> None:
    message = run_ranks(4, _skip_an_expert_collective_on_rank_3)[2]
    assert message.startswith(
        "Rank 2 (stage 1, dp 0, cp 0, tp 0, edp 0, ep 0) was left waiting in "
        "allreduce(float32[3]; sum) of expert_model_parallel[2, 3]; look at the logs of rank 3. torch says: "
    )
    assert "2000ms" in message


def _receive_from_a_dying_rank(asynchronous: bool) -> None:
    process_groups.start(ParallelLayout(world=2, pp=2), timeout_seconds=20)
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(9)
    with name_failed_communication(ParallelLayout(world=2, pp=2)):
        if asynchronous:
            dist.irecv(torch.empty(5), 1).wait()
        else:
            dist.recv(torch.empty(5), 1)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_lost_peer_is_named_at_once(asynchronous: bool) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(2, _receive_from_a_dying_rank, asynchronous)
    assert (
        "was left waiting in recv(float32[5]; from rank 1) of default[0, 1]; look at the logs of rank 1"
        in caught.value.failures[0]
    )
    assert time.monotonic() - start < 18  # not the 20 s of the timeout


def _other_error() -> str:
    with pytest.raises(RuntimeError) as caught, name_failed_communication(ParallelLayout(world=1)):
        torch.ones(2) @ torch.ones(3)
    return type(caught.value).__name__


def test_an_error_that_is_not_about_communication_passes_unchanged() -> None:
    assert run_ranks(1, _other_error) == ["RuntimeError"]
