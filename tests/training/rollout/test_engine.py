"""An engine that does not take new weights ends the job on every rank, and leaves none in a collective."""

from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from megatron_ads.errors import DataError, MegatronAdsError
from parity_tests.harness.ranks import run_ranks


def _weights() -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("one", "two"):
        value = torch.ones(1)
        dist.all_reduce(value)
        yield name, value


def _refused() -> str:
    from megatron_ads.training.rollout.engine import RolloutEngine

    lost = Mock(**{"update_weights.side_effect": DataError("the server is lost")})
    sync = Mock(**{"tensors.return_value": _weights()})
    engine = RolloutEngine(
        engine=lost if dist.get_rank() == 0 else None, ranks=(0,), sync=sync, longest_wait_seconds=20
    )
    with pytest.raises(MegatronAdsError) as caught:
        engine.follow(Mock())
    return str(caught.value)


def test_weights_that_one_engine_does_not_take_end_the_job_on_every_rank() -> None:
    assert run_ranks(2, _refused) == ["the server is lost"] * 2
