"""What a rank knows about its own communications, from real ones between two ranks."""

import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_ads.runtime.health.activity import Activity, RankState, observed
from parity_tests.harness.ranks import run_ranks

PAUSE = 0.4


def _work_unevenly() -> float:
    """Rank 1 works for longer, behind a call that it does not wait for at once."""
    activity = Activity()
    with observed(activity):
        dist.barrier()
        activity.stalls.restart(measured=True)
        work = dist.all_reduce(torch.ones(2), async_op=True)
        time.sleep(PAUSE if dist.get_rank() == 1 else 0.0)
        work.wait()
        dist.barrier()
        stalled = activity.stalls.seconds()
        activity.stalls.restart(measured=True)
        assert activity.stalls.seconds() == 0.0
    return stalled


def test_the_victim_stands_still_for_as_long_as_the_slow_rank_works() -> None:
    victim, slow = run_ranks(2, _work_unevenly)
    # The all-reduce needs both; the sleep is over before rank 1 waits for it.
    assert victim > 0.9 * PAUSE
    assert slow < 0.5 * PAUSE


def _ask_during_and_after() -> tuple[RankState, RankState]:
    activity, during = Activity(), []
    with observed(activity):
        dist.all_reduce(torch.ones(2))
        activity.enter_step(5)
        if dist.get_rank() == 1:
            time.sleep(2 * PAUSE)
            dist.send(torch.ones(3), 0)
        else:
            asker = threading.Timer(PAUSE, lambda: during.append(activity.state()))
            asker.start()
            dist.recv(torch.ones(3), 1)
            asker.join()
        dist.barrier()
    return during[0] if during else activity.state(), activity.state()


def test_another_thread_sees_the_call_that_this_one_waits_in() -> None:
    (during, after), (sender, _) = run_ranks(2, _ask_during_and_after)
    assert during.wait is not None
    assert str(during.wait) == "recv(float32[3]; from rank 1) of default[0, 1]"
    assert (during.wait.ranks, during.wait.number, during.phase) == ([1, 0], 1, "step 5")
    assert 0.3 * PAUSE < during.idle_seconds < 2 * PAUSE
    assert any("test_activity.py" in frame and "_ask_during_and_after" in frame for frame in during.stack)
    assert after.wait is None and after.idle_seconds < PAUSE
    # One all-reduce and one barrier; both sides count a message under the same name.
    assert sender.calls == after.calls
    assert sorted(after.calls.values()) == [1, 2]


def _receive_in_a_batch() -> list[Any]:
    """Make the calls that are made under NCCL, where the batch has the handle and its parts have none."""
    activity, group = Activity(), dist.group.WORLD
    tensors, other = [torch.zeros(2)], 1 - dist.get_rank()
    if dist.get_rank() == 1:
        time.sleep(PAUSE)
        group.send([torch.ones(2)], other, 0).wait()
        return []
    activity.begin(group, "recv", (tensors, other, 0))
    activity.issued("recv", None)
    work = group.recv(tensors, other, 0)
    activity.batch_issued(work)
    described = activity.describe(0)
    activity.wait_begins(work)
    waiting = activity.state().wait
    work.wait()
    activity.wait_ends()
    return [described, str(waiting), activity.state().wait, tensors[0].tolist()]


def test_calls_of_a_coalesced_batch_share_its_handle() -> None:
    described, waiting, after, received = run_ranks(2, _receive_in_a_batch)[0]
    assert described == "recv(float32[2]; from rank 1) of default[0, 1]; look at the logs of rank 1"
    assert waiting == "recv(float32[2]; from rank 1) of default[0, 1]"
    assert after is None and received == [1.0, 1.0]
