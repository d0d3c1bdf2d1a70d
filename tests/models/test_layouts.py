"""One training pass gives the same loss and the same gradients under every layout; more layouts are in rung 8."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ads.layout import ParallelLayout
from parity_tests.harness.model_jobs import Job, PassResult, own_slice, train_pass
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import V3, write_checkpoint

LOSS_TOLERANCE = 1e-6
"""Relative: a sum of 100 FP32 losses in another order."""
GRADIENT_TOLERANCE = 2e-5
"""Relative to the largest value of the same gradient: FP32 sums over tokens, in another order per layout."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2 ep2": {"world": 4, "pp": 2, "ep": 2},
    "pp4": {"world": 4, "pp": 4},
    "dp2": {"world": 2},
    "tp2 etp1 ep2": {"world": 2, "tp": 2, "etp": 1, "ep": 2},
    "tp2 etp1": {"world": 2, "tp": 2, "etp": 1},
    "tp2 pp2": {"world": 4, "tp": 2, "pp": 2, "etp": 2},
}
PIPELINES = {
    "dense-only first stage": "Ett|t|t|mL",
    "everything in the middle": "E||tttt|mL",
    "MTP layer on a stage of its own": "Ett|tt|m|L",
}
SETTINGS = {"expert_bias_update_rate": 0.001, "mtp_loss_weight": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("layouts") / "hf", V3)


@pytest.fixture(scope="module")
def alone(folder: Path) -> PassResult:
    (result,) = run_ranks(1, train_pass, Job(folder=folder, settings=SETTINGS))
    return result


def _agrees(job: Job, alone: PassResult) -> bool:
    """Assert that loss and gradients are those of one rank; return whether the load of the experts is too."""
    layout = job.layout
    results = run_ranks(layout.world, train_pass, job)
    tp_and_copies = layout.tp
    assert sum(result.loss_sum for result in results) / tp_and_copies == pytest.approx(
        alone.loss_sum, rel=LOSS_TOLERANCE
    )
    seen = set()
    for rank, result in enumerate(results):
        where = layout.coordinates(rank)
        for name, grad in result.grads.items():
            seen.add(name)
            full = alone.grads[name]
            expected = own_slice(name, full, grad.shape, where.etp if ".mlp.experts." in name else where.tp)
            error = float((grad - expected).abs().max() / full.abs().max().clamp(min=1e-30))
            assert error < GRADIENT_TOLERANCE, f"rank {rank}: {name} is off by {error:.1e} of its largest value"
        for name, bias in result.expert_bias.items():
            assert any(torch.equal(bias, other) for other in alone.expert_bias.values()), name
    assert seen == set(alone.grads)
    return {round(result.load, 6) for result in results} == {round(alone.load, 6)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pass_is_the_same_under_every_layout(folder: Path, alone: PassResult, layout: dict[str, Any]) -> None:
    assert _agrees(Job(folder=folder, layout=ParallelLayout(**layout), settings=SETTINGS), alone)


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_a_pass_is_the_same_with_stages_without_experts_or_layers(
    folder: Path, alone: PassResult, pipeline: str
) -> None:
    layout = ParallelLayout(world=4, pp=4)
    assert _agrees(Job(folder=folder, layout=layout, pipeline=pipeline, settings=SETTINGS), alone)


@pytest.mark.parametrize(
    "layout", [LAYOUTS["pp2 ep2"], LAYOUTS["dp2"], {"world": 2, "tp": 2, "etp": 2}], ids=["pp2 ep2", "dp2", "tp2"]
)
def test_the_balancing_loss_is_the_same_under_every_layout(folder: Path, layout: dict[str, Any]) -> None:
    settings = {"aux_loss_coefficient": 0.1}
    (balanced,) = run_ranks(1, train_pass, Job(folder=folder, settings=settings))
    (plain,) = run_ranks(1, train_pass, Job(folder=folder))
    router = "decoder.layers.3.mlp.router.weight"
    assert float((balanced.grads[router] - plain.grads[router]).abs().max()) > 1e-4
    assert _agrees(Job(folder=folder, layout=ParallelLayout(**layout), settings=settings), balanced)
