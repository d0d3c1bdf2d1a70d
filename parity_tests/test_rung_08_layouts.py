"""Rung 8: logits, loss and gradients do not depend on the layout, up to 8 processes.

A failure means a reduction that is missing or done twice, or a message between stages that arrives at another one.
The parameter named in the message says which: a norm or down-projection points at tensor parallelism, an expert at
expert parallelism, everything of a stage at the pipeline.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ads.layout import ParallelLayout
from parity_tests import jobs
from parity_tests.checkpoint_errors import EPSILON_CHANGED
from parity_tests.figures import record
from parity_tests.jobs import PATIENCE, Job, PassResult
from parity_tests.tolerances import LAYOUT_GRADIENTS, LAYOUT_LOGITS, LAYOUT_LOSS
from tests.distributed import run_ranks
from tests.models.jobs import own_slice

SETTINGS = {"router_bias_update_rate": 0.001, "mtp_loss_weight": 0.3}
LAYOUTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "pp4 ep2": ({"world": 8, "pp": 4, "ep": 2}, None),
    "tp2 pp2 ep2 etp1": ({"world": 8, "tp": 2, "pp": 2, "ep": 2}, None),
    "first stage without experts": ({"world": 4, "pp": 4}, "Et|t|t|tmL"),
    "ep4": ({"world": 4, "ep": 4}, None),
    "tp2 etp2": ({"world": 2, "tp": 2, "etp": 2}, None),
    "pp2 vpp2": ({"world": 2, "pp": 2, "vpp": 2}, None),
    "stage without layers": ({"world": 4, "pp": 4}, "E|tt|tt|mL"),
}


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[[str], Path]) -> tuple[Job, PassResult, list[torch.Tensor]]:
    """Return the job on one process, its gradients, and the logits of its four rows."""
    job = Job(folder=checkpoint("small-v3"), settings=SETTINGS)
    return job, run_ranks(1, jobs.gradients, job)[0], run_ranks(1, jobs.pipeline_logits, job)[0]


def _on(job: Job, name: str) -> Job:
    sizes, pipeline = LAYOUTS[name]
    return replace(job, layout=ParallelLayout(**sizes), pipeline=pipeline)


def _gradient_difference(layout: ParallelLayout, results: list[PassResult], alone: PassResult) -> tuple[float, str]:
    """Return the largest difference of any rank's slice, over the largest value of that gradient, and its name."""
    assert {name for result in results for name in result.grads} == set(alone.grads)
    worst = (0.0, "")
    for rank, result in enumerate(results):
        at = layout.coordinates(rank)
        for name, grad in result.grads.items():
            full = alone.grads[name]
            own = own_slice(name, full, grad.shape, at.etp if ".mlp.experts." in name else at.tp)
            error = float((grad - own).abs().max() / full.abs().max().clamp(min=1e-30))
            worst = max(worst, (error, f"{name} on rank {rank}"))
    return worst


def _loss(layout: ParallelLayout, results: list[PassResult]) -> float:
    return sum(result.loss_sum for result in results) / layout.tp  # every tensor-parallel rank reports it


def _logit_difference(job: Job, results: list[list[torch.Tensor]], alone: list[torch.Tensor]) -> float:
    """Compare the last stage's logits: each rank has its replica's rows, and its part of the vocabulary."""
    worst, layout = 0.0, job.layout
    for rank in layout.stage_ranks(layout.pp - 1):
        at = layout.coordinates(rank)
        for logits, full in zip(results[rank], alone[at.dp :: layout.dp], strict=True):
            worst = max(worst, float((logits - full.chunk(layout.tp, -1)[at.tp]).abs().max()))
    return worst


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_loss_and_gradients_are_those_of_one_process(
    alone: tuple[Job, PassResult, list[torch.Tensor]], name: str
) -> None:
    job, right, right_logits = _on(alone[0], name), alone[1], alone[2]
    results = run_ranks(job.layout.world, jobs.gradients, job, timeout=PATIENCE)
    loss = abs(_loss(job.layout, results) / right.loss_sum - 1)
    gradient, where = _gradient_difference(job.layout, results, right)
    logits_by_rank = run_ranks(job.layout.world, jobs.pipeline_logits, job, timeout=PATIENCE)
    logits = _logit_difference(job, logits_by_rank, right_logits)
    record(8, f"{name}: relative difference of the loss", loss, LAYOUT_LOSS)
    record(8, f"{name}: largest difference of a gradient", gradient, LAYOUT_GRADIENTS)
    record(8, f"{name}: largest difference of a logit", logits, LAYOUT_LOGITS)
    assert loss < LAYOUT_LOSS.value
    assert gradient < LAYOUT_GRADIENTS.value, f"{where} is off by {gradient:.1e} of its largest value"
    assert logits < LAYOUT_LOGITS.value


def test_a_missing_reduction_is_seen(alone: tuple[Job, PassResult, list[torch.Tensor]]) -> None:
    job = _on(alone[0], "tp2 etp2")
    results = run_ranks(2, jobs.with_error, "replicated_gradients_not_summed", jobs.gradients, job)
    assert _gradient_difference(job.layout, results, alone[1])[0] > LAYOUT_GRADIENTS.value


def test_an_error_in_the_logits_under_a_layout_is_seen(
    alone: tuple[Job, PassResult, list[torch.Tensor]], tmp_path: Path
) -> None:
    wrong = replace(_on(alone[0], "tp2 etp2"), folder=EPSILON_CHANGED.write(alone[0].folder, tmp_path / "wrong"))
    assert _logit_difference(wrong, run_ranks(2, jobs.pipeline_logits, wrong), alone[2]) > LAYOUT_LOGITS.value
    losses = run_ranks(2, jobs.gradients, wrong)
    assert abs(_loss(wrong.layout, losses) / alone[1].loss_sum - 1) > LAYOUT_LOSS.value
