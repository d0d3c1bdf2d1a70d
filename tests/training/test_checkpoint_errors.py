"""What one rank raises while others still work is what all of them say."""

import time

import torch.distributed as dist

from megatron_ads.errors import DataError, MegatronAdsError
from parity_tests.harness.ranks import run_ranks


def _ended(seconds_of_rank_1: float, rank_0_fails: bool) -> str:
    from megatron_ads.training.checkpoint_errors import raised_once_all_are_done

    try:
        with raised_once_all_are_done("generate their answers", 0.5):
            if dist.get_rank() == 1:
                time.sleep(seconds_of_rank_1)
            elif rank_0_fails:
                raise DataError("the engine is lost")
    except MegatronAdsError as error:
        return str(error)
    return "done"


def test_the_error_of_a_rank_is_raised_on_all_also_if_another_is_not_done_in_time() -> None:
    assert run_ranks(2, _ended, 0.0, False) == ["done"] * 2
    assert run_ranks(2, _ended, 0.0, True) == ["the engine is lost"] * 2
    assert run_ranks(2, _ended, 1.5, True) == ["the engine is lost"] * 2
    slow, late = run_ranks(2, _ended, 1.5, False)
    assert slow == late and slow.startswith("rank 1 of 2 did not generate their answers within 0.5 s")
