"""What goes wrong with one rank's engine ends the job on every rank, and leaves none in a collective."""

from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from megatron_ads.errors import DataError, MegatronAdsError
from megatron_ads.inference.engine import Engine
from megatron_ads.inference.server_pool import Probe, ServerPool
from parity_tests.harness.ranks import run_ranks


class Gone(ServerPool):
    """Servers that have been lost twice, and do not answer."""

    def __init__(self) -> None:
        self.servers = SimpleNamespace(losses=2)  # type: ignore[assignment]

    def require_agreement(self, probe: Probe) -> float:
        raise DataError("no inference server scored the probe.")


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


def _not_probed() -> tuple[str, dict[str, float]]:
    from megatron_ads.training.rollout.engine import RolloutEngine

    own: Engine | None = Gone() if dist.get_rank() == 0 else None
    engine = RolloutEngine(engine=own, ranks=(0,), sync=Mock(), longest_wait_seconds=20)
    with pytest.raises(MegatronAdsError) as caught:
        engine.gap(Probe([[5]], [[1]], [[-0.5]]))
    return str(caught.value), engine.metrics()


def test_weights_that_one_engine_does_not_take_end_the_job_on_every_rank() -> None:
    assert run_ranks(2, _refused) == ["the server is lost"] * 2


def test_servers_of_which_none_is_probed_end_the_job_on_every_rank_and_their_losses_are_a_metric() -> None:
    said, metrics = zip(*run_ranks(2, _not_probed), strict=True)
    assert said == ("no inference server scored the probe.",) * 2
    assert metrics == ({"rollout/server_losses": 2}, {})
