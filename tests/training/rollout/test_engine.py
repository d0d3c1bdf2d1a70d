"""What goes wrong with one rank's engine ends the job on every rank, and leaves none in a collective."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from conversion.convert import to_hf
from conversion.hf_folder import open_hf_folder
from conversion.to_hf import ExportDtype
from megatron_ads.config.recipes import load_job
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
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


def test_an_engine_beside_the_trainer_takes_weights_though_its_checkpoint_is_in_fp8_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ads.inference import model_folder
    from megatron_ads.training.rollout.engine import _colocated

    write_demo_model(tmp_path / "fp8", CONFIGS[Preset.tiny], fp8=True)
    monkeypatch.setattr(model_folder, "device", lambda: torch.device("cuda"))
    config: Any = load_job("rl/quickstart", [f"model.load={tmp_path / 'fp8'}"])
    engine = _colocated(config, Mock(end_token_id=1))
    to_hf(tmp_path / "fp8", tmp_path / "bf16", dtype=ExportDtype.BF16)
    stored = open_hf_folder(tmp_path / "bf16").tensors
    engine.update_weights((name, tensor.read()) for name, tensor in stored.items())


def test_weights_that_one_engine_does_not_take_end_the_job_on_every_rank() -> None:
    assert run_ranks(2, _refused) == ["the server is lost"] * 2


def test_servers_of_which_none_is_probed_end_the_job_on_every_rank_and_their_losses_are_a_metric() -> None:
    said, metrics = zip(*run_ranks(2, _not_probed), strict=True)
    assert said == ("no inference server scored the probe.",) * 2
    assert metrics == ({"rollout/server_losses": 2}, {})
