"""Servers as the engine of a job: what the other ranks do meanwhile, and what is told of them."""

from types import SimpleNamespace

import pytest

from megatron_ads.errors import DataError
from megatron_ads.inference.engine import Engine
from megatron_ads.inference.server_pool import Probe, ServerPool
from megatron_ads.training.rollout import engine
from megatron_ads.training.rollout.engine import RolloutEngine

PROBE = Probe([[5]], [[1]], [[-0.5]])


class Gone(ServerPool):
    """Servers that have been lost twice, and do not answer."""

    def __init__(self) -> None:
        self.servers = SimpleNamespace(losses=2)  # type: ignore[assignment]

    def require_agreement(self, probe: Probe) -> float:
        raise DataError("no inference server scored the probe.")


def rank_with(own: Engine | None) -> RolloutEngine:
    return RolloutEngine(engine=own, ranks=(0,), sync=None, longest_wait_seconds=7)  # type: ignore[arg-type]


def test_every_rank_waits_for_the_one_that_probes_servers_also_if_none_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    monkeypatch.setattr(engine, "wait_for_all", lambda _, seconds: waits.append(seconds))
    assert rank_with(None).gap(PROBE) == 0 and waits == [7]
    with pytest.raises(DataError, match="scored the probe"):
        rank_with(Gone()).gap(PROBE)
    assert waits == [7, 7]


def test_losses_of_servers_are_a_metric_of_the_rank_that_asks_them() -> None:
    assert rank_with(Gone()).metrics() == {"rollout/server_losses": 2}
    assert rank_with(None).metrics() == {}
