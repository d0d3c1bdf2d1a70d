"""Four real ranks of which one dies: the others end soon, with the documented status, and name it."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_ads.errors import TopologyError
from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.health.activity import name_failed_communication
from megatron_ads.runtime.health.peers import LostPeer, PeerMonitor
from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.harness.ranks import RanksFailed, run_ranks

LAYOUT = ParallelLayout(world=4, pp=2, ep=2)
STAGE = {0: 0, 1: 0, 2: 1, 3: 1}


def _sleep() -> None:
    time.sleep(60)


def _wait_for_all() -> None:
    dist.barrier()


def _wait_for_the_next_rank() -> None:
    """Each rank waits for the one after it, so that most wait for ranks that are alive."""
    dist.recv(torch.empty(1), (dist.get_rank() + 1) % 4)


def _lose_a_rank(victim: int, others_do: Callable[[], None]) -> None:
    with PeerMonitor(LAYOUT) as monitor, name_failed_communication(LAYOUT):
        monitor.report_step(6)
        monitor.report_step(7)
        dist.barrier()
        if dist.get_rank() == victim:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        others_do()


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("others_do", [_sleep, _wait_for_all, _wait_for_the_next_rank])
def test_a_killed_rank_is_named_by_all_others_wherever_they_wait(victim: int, others_do: Callable[[], None]) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(4, _lose_a_rank, victim, others_do)
    # 60 s is the requirement; no timeout is waited for, but a busy machine is slow to start ranks.
    assert time.monotonic() - start < 60
    assert caught.value.failures.pop(victim).startswith("died with exit status -9")
    assert len(caught.value.failures) == 3
    said = f"rank {victim} (stage {STAGE[victim]}) has gone (killed, or its machine lost), after step 7"
    for failure in caught.value.failures.values():
        assert failure.startswith(f"died with exit status {int(ExitStatus.PEER_LOST)}")
        assert said in failure


def _lose_two_ranks() -> None:
    with PeerMonitor(LAYOUT):
        dist.barrier()
        if dist.get_rank() in (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        _sleep()


def test_ranks_cut_off_from_each_other_by_two_deaths_all_end() -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(4, _lose_two_ranks)
    for survivor in (0, 2):
        assert f"exit status {int(ExitStatus.PEER_LOST)}" in caught.value.failures[survivor]
        assert "has gone (killed, or its machine lost), before its first step ended" in caught.value.failures[survivor]


def _die_and_leave_a_child() -> None:
    with PeerMonitor(LAYOUT):
        dist.barrier()
        if dist.get_rank() == 1:
            if os.fork() == 0:
                time.sleep(20)  # longer than the others are given to end
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        _sleep()


def test_a_surviving_child_process_does_not_hide_the_death_of_its_rank() -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(4, _die_and_leave_a_child, timeout=15)
    assert "rank 1 (stage 0) has gone" in caught.value.failures[3]


def _raise_on_rank_1() -> None:
    with PeerMonitor(LAYOUT) as monitor:
        monitor.report_step(3)
        if dist.get_rank() == 1:
            raise ValueError("the reason\nand details")
        _sleep()


def test_an_error_on_one_rank_ends_the_others_with_its_text() -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(4, _raise_on_rank_1)
    assert caught.value.failures.pop(1).startswith("raised")
    for failure in caught.value.failures.values():
        assert failure.startswith(f"died with exit status {int(ExitStatus.PEER_LOST)}")
        assert "rank 1 (stage 0) failed with ValueError: the reason, after step 3" in failure


def _raise_the_same_everywhere() -> str:
    try:
        with PeerMonitor(LAYOUT):
            time.sleep(dist.get_rank() * 0.3)
            raise TopologyError("found by all")
    except TopologyError as error:
        return str(error)


def test_an_error_that_all_ranks_find_is_left_to_each_of_them() -> None:
    assert run_ranks(4, _raise_the_same_everywhere) == ["found by all"] * 4


def _work_slowly() -> int:
    with PeerMonitor(LAYOUT) as monitor:
        for step in range(3):
            monitor.report_step(step)
            if dist.get_rank() == 2:
                sum(range(10_000_000))  # holds the interpreter lock
    time.sleep(0.2 * dist.get_rank())  # ranks end at different times
    return threads()


def threads() -> int:
    """Return the number of Python threads of this process."""
    import threading

    return threading.active_count()


def test_slow_ranks_and_uneven_ends_disturb_nobody_and_nothing_stays_running() -> None:
    assert run_ranks(4, _work_slowly) == [1] * 4


def _work_as_on_two_machines() -> str:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return _raise_the_same_everywhere()


def test_ranks_on_several_machines_find_each_other_by_the_address_of_the_first() -> None:
    assert run_ranks(4, _work_as_on_two_machines) == ["found by all"] * 4


def _record_the_loss(folder: str) -> None:
    def write(loss: LostPeer) -> None:
        with open(f"{folder}/{dist.get_rank()}", "w") as file:
            file.write(f"{loss.rank} {loss.step} {loss.error}")

    with PeerMonitor(ParallelLayout(world=2), on_loss=write):
        dist.barrier()
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        _sleep()


def test_the_loss_can_be_recorded_before_the_process_ends(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("losses")
    with pytest.raises(RanksFailed):
        run_ranks(2, _record_the_loss, str(folder))
    assert (folder / "1").read_text() == "0 None None"


def _alone() -> str:
    with PeerMonitor(ParallelLayout(world=1)) as monitor:
        monitor.report_step(1)
    return "done"


def test_a_single_rank_has_nobody_to_watch() -> None:
    assert run_ranks(1, _alone) == ["done"]
