"""The router's bias policy, and the measure of how evenly it spreads tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.harness import model_jobs
from parity_tests.harness.model_jobs import Job, train_pass
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import MOONLIGHT, V2_LITE, V3, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("router") / "hf", V3)


def _loaded_biases(job: Job) -> dict[str, Tensor]:
    (model,), _, _ = model_jobs.build(job)
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith("expert_bias")}


def test_a_frozen_bias_never_changes_in_training(folder: Path) -> None:
    (loaded,) = run_ranks(1, _loaded_biases, Job(folder=folder))
    (trained,) = run_ranks(1, train_pass, Job(folder=folder))
    assert trained.expert_bias.keys() == loaded.keys() and len(loaded) == 2 + 1
    for name, bias in loaded.items():
        assert torch.equal(trained.expert_bias[name], bias), name


def _counted_pass(job: Job) -> tuple[dict[int, Tensor], Any]:
    """Run a training pass and count each layer's tokens per expert apart from the product."""
    from megatron.core.transformer.moe.router import TopKRouter

    counts: dict[int, Tensor] = {}
    original = TopKRouter.routing

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights, chosen = original(self, *args, **kwargs)
        counts[self.layer_number - 1] = counts.get(self.layer_number - 1, 0) + chosen.float().sum(0)
        return weights, chosen

    TopKRouter.routing = counting
    try:
        return counts, train_pass(job)
    finally:
        TopKRouter.routing = original


def test_an_updated_bias_moves_by_the_rate_against_the_load(folder: Path) -> None:
    rate = 0.25
    (loaded,) = run_ranks(1, _loaded_biases, Job(folder=folder))
    ((counts, result),) = run_ranks(1, _counted_pass, Job(folder=folder, settings={"expert_bias_update_rate": rate}))
    for layer in (2, 3):
        name = f"decoder.layers.{layer}.mlp.router.expert_bias"
        busy = counts[layer].mean() - counts[layer]  # arXiv:2408.15664: b += u * sign(mean - count)
        assert torch.equal(result.expert_bias[name], loaded[name] + rate * busy.sign()), name
        assert len(busy.sign().unique()) > 1


@pytest.mark.parametrize("config", [V3, V2_LITE, MOONLIGHT], ids=["with a bias", "without a bias", "without groups"])
def test_load_is_the_busiest_expert_over_the_average_one(tmp_path: Path, config: dict[str, Any]) -> None:
    job = Job(folder=write_checkpoint(tmp_path / "hf", config))
    ((counts, result),) = run_ranks(1, _counted_pass, job)
    assert len(counts) == config["num_hidden_layers"] - config["first_k_dense_replace"]
    by_hand = [float(count.max() / count.mean()) for count in counts.values()]
    assert result.load == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-6)
    assert result.load > 1


def _loads_of_an_evaluation_and_an_empty_step(job: Job) -> tuple[float, float]:
    (model,), _, _ = model_jobs.build(job)
    from megatron_ads.models.experts import ExpertLoad

    load = ExpertLoad([model])
    with torch.no_grad():
        model(torch.arange(16)[None], torch.arange(16)[None], None)
    evaluated = load.measure()
    return evaluated, load.measure()


def test_evaluations_do_not_count(folder: Path) -> None:
    assert run_ranks(1, _loads_of_an_evaluation_and_an_empty_step, Job(folder=folder)) == [(1.0, 1.0)]
