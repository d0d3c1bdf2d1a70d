"""The harness of the distributed tests itself: results, exceptions, deaths, hangs, leftovers."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from parity_tests.harness.ranks import RanksFailed, run_ranks


def _sum_of_ranks(factor: int) -> float:
    total = torch.tensor(float(dist.get_rank() * factor))
    dist.all_reduce(total)
    return total.item()


def _process_id() -> int:
    return os.getpid()


def _raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")


def _raise_on_rank_1_while_the_others_wait_for_it() -> None:
    _raise_on_rank_1()
    dist.barrier()


def _die_on_rank_0() -> None:
    print("last words", flush=True)
    if dist.get_rank() == 0:
        os._exit(7)


def _sleep_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def _environment_without_a_group() -> tuple[bool, str, str]:
    return dist.is_initialized(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_results_come_back_by_rank_and_collectives_work() -> None:
    # (0 + 1) * 5 on both ranks
    assert run_ranks(2, _sum_of_ranks, 5) == [5.0, 5.0]


def test_each_call_has_processes_of_its_own() -> None:
    assert not set(run_ranks(2, _process_id)) & set(run_ranks(2, _process_id))


def test_an_exception_is_reported_with_its_rank_and_traceback() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 of 2 raised[\s\S]*ValueError: the reason") as caught:
        run_ranks(2, _raise_on_rank_1)
    assert list(caught.value.failures) == [1]


def test_ranks_that_wait_for_a_failed_one_do_not_hold_up_the_report() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="ValueError: the reason"):
        run_ranks(2, _raise_on_rank_1_while_the_others_wait_for_it)
    assert time.monotonic() - start < 30  # not the 60 s after which gloo gives up
    assert run_ranks(2, _sum_of_ranks, 1) == [1.0, 1.0]


def test_a_death_is_reported_with_the_output() -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 of 2 died with exit status 7[\s\S]*last words"):
        run_ranks(2, _die_on_rank_0)
    assert run_ranks(2, _sum_of_ranks, 1) == [1.0, 1.0]


def test_a_hang_is_ended_with_the_stack_of_the_rank_that_hung() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="_sleep_on_rank_1") as caught:
        run_ranks(2, _sleep_on_rank_1, timeout=1)
    assert list(caught.value.failures) == [1]
    assert time.monotonic() - start < 30  # not the 60 s for which it sleeps
    assert run_ranks(2, _sum_of_ranks, 1) == [1.0, 1.0]


def test_without_a_process_group_only_the_environment_is_set() -> None:
    assert run_ranks(2, _environment_without_a_group, process_group=False) == [(False, "0", "2"), (False, "1", "2")]
