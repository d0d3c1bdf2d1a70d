"""Rung 8: logits, loss and gradients do not depend on the layout, up to 8 processes.

A failure means a reduction that is missing or done twice, or a message between stages that arrives at another one.
The parameter named in the message says which: a norm or down-projection points at tensor parallelism, an expert at
expert parallelism, everything of a stage at the pipeline.

On CUDA each rank needs a GPU of its own, as NCCL gives no two ranks the same one; where there are fewer, the layout is
skipped with that reason and its ranks on the CPU speak for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ads.layout import ParallelLayout
from parity_tests import jobs
from parity_tests.deliberate_errors import EPSILON_CHANGED
from parity_tests.harness.model_jobs import own_slice
from parity_tests.jobs import PATIENCE, Job, PassResult
from parity_tests.machines import CPU_BF16, CPU_FP32, CUDA_BF16, CUDA_MARKS, FP32, Machine
from parity_tests.passes import largest_noise_ratio, noise_ratio
from parity_tests.tolerances import BF16_GRADIENTS, BF16_NOISE, LAYOUT_GRADIENTS, LAYOUT_LOGITS, LAYOUT_LOSS, record

SETTINGS = {"expert_bias_update_rate": 0.001, "mtp_loss_weight": 0.3}
LAYOUTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "pp4 ep2": ({"world": 8, "pp": 4, "ep": 2}, None),
    "tp2 pp2 ep2 etp1": ({"world": 8, "tp": 2, "pp": 2, "ep": 2}, None),
    "first stage without experts": ({"world": 4, "pp": 4}, "Et|t|t|tmL"),
    "ep4": ({"world": 4, "ep": 4}, None),
    "tp2 etp2": ({"world": 2, "tp": 2, "etp": 2}, None),
    "pp2 vpp2": ({"world": 2, "pp": 2, "vpp": 2}, None),
    "stage without layers": ({"world": 4, "pp": 4}, "E|tt|tt|mL"),
}
DENSE_LAYOUTS: dict[str, dict[str, Any]] = {
    "qwen2": {"world": 2, "tp": 2},
    "qwen2-tied": {"world": 8, "tp": 2, "pp": 2},
    "llama": {"world": 2, "pp": 2, "vpp": 2},
    "llama-tied": {"world": 4, "tp": 2, "pp": 2},
}
"""Of dense families: whole query groups a rank, biases divided and not, the copy of a tied output layer."""
BF16_LAYOUTS = [
    pytest.param("tp2 pp2 ep2 etp1", CPU_BF16, id=f"tp2 pp2 ep2 etp1-{CPU_BF16}"),
    *(pytest.param(name, CUDA_BF16, marks=CUDA_MARKS, id=f"{name}-{CUDA_BF16}") for name in LAYOUTS),
]
"""On the CPU the one with all reductions: there only the comparison is on trial."""


@dataclass(frozen=True)
class OneProcess:
    """The job on one process of a machine."""

    job: Job
    grads: PassResult
    logits: Tensor
    """Of its four rows."""


Alone = Callable[[Machine], OneProcess]


def _on_one_process(job: Job, machine: Machine) -> OneProcess:
    (grads,), logits = machine.run(1, jobs.gradients, job), machine.run(1, jobs.pipeline_logits, job)
    return OneProcess(job, grads, _gathered(job.layout, logits))


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[[str], Path]) -> Alone:
    """Run the job on one process of a machine, once."""
    return cache(lambda machine: _on_one_process(machine.job(checkpoint("small-v3"), **SETTINGS), machine))


def _on(job: Job, name: str) -> Job:
    sizes, pipeline = LAYOUTS[name]
    return replace(job, layout=ParallelLayout(**sizes), pipeline=pipeline)


def _gradient_difference(layout: ParallelLayout, results: list[PassResult], alone: PassResult) -> tuple[float, str]:
    """Return the largest difference of any rank's slice, over the largest value of that gradient, and its name."""
    assert {name for result in results for name in result.grads} == set(alone.grads)
    worst = (0.0, "")
    for rank, result in enumerate(results):
        for name, grad in result.grads.items():
            full = alone.grads[name]
            own = _own(layout, rank, name, full, grad)
            error = float((grad - own).abs().max() / full.abs().max().clamp(min=1e-30))
            worst = max(worst, (error, f"{name} on rank {rank}"))
    return worst


def _own(layout: ParallelLayout, rank: int, name: str, full: Tensor, grad: Tensor) -> Tensor:
    at = layout.coordinates(rank)
    return own_slice(name, full, grad.shape, at.etp if ".mlp.experts." in name else at.tp)


def _loss(layout: ParallelLayout, results: list[PassResult]) -> float:
    return sum(result.loss_sum for result in results) / layout.tp  # every tensor-parallel rank reports it


def _gathered(layout: ParallelLayout, results: list[list[Tensor]]) -> Tensor:
    """Return the logits of the four rows from the last stage: each rank has its replica's rows, and its vocabulary."""
    rows: dict[int, dict[int, Tensor]] = {}
    for rank in layout.stage_ranks(layout.pp - 1):
        at = layout.coordinates(rank)
        for number, logits in enumerate(results[rank]):
            rows.setdefault(at.dp + number * layout.dp, {})[at.tp] = logits
    return torch.stack([torch.cat([parts[tp] for tp in range(layout.tp)], -1) for _, parts in sorted(rows.items())])


@pytest.mark.parametrize("machine", FP32, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_loss_and_gradients_are_those_of_one_process(alone: Alone, name: str, machine: Machine) -> None:
    job, right = _on(alone(machine).job, name), alone(machine)
    results, too_far = _compare(job, right, name, machine)
    assert too_far == []
    if machine is CPU_FP32:  # every token goes to the same experts
        biases = list(right.grads.expert_bias.values())
        assert all(
            any(torch.equal(bias, one) for one in biases) for rank in results for bias in rank.expert_bias.values()
        )
        assert {round(rank.load, 6) for rank in results} == {round(right.grads.load, 6)}


@pytest.mark.parametrize("machine", FP32, ids=str)
@pytest.mark.parametrize("family", DENSE_LAYOUTS)
def test_a_dense_model_computes_under_a_layout_what_it_does_on_one_process(
    checkpoint: Callable[[str], Path], family: str, machine: Machine
) -> None:
    right = _on_one_process(machine.job(checkpoint(family)), machine)
    layout = ParallelLayout(**DENSE_LAYOUTS[family])
    name = f"{family} {DENSE_LAYOUTS[family]}"
    _, too_far = _compare(replace(right.job, layout=layout), right, name, machine)
    assert too_far == []


def _compare(job: Job, right: OneProcess, name: str, machine: Machine) -> tuple[list[PassResult], list[str]]:
    """Return what each rank saw, and which of loss, gradients and logits are not those of one process."""
    results = machine.run(job.layout.world, jobs.gradients, job, timeout=PATIENCE)
    loss = abs(_loss(job.layout, results) / right.grads.loss_sum - 1)
    gradient, where = _gradient_difference(job.layout, results, right.grads)
    logits_by_rank = machine.run(job.layout.world, jobs.pipeline_logits, job, timeout=PATIENCE)
    logits = float((_gathered(job.layout, logits_by_rank) - right.logits).abs().max())
    record(8, f"{name}: relative difference of the loss", loss, LAYOUT_LOSS, machine)
    record(8, f"{name}: largest difference of a gradient", gradient, LAYOUT_GRADIENTS, machine)
    record(8, f"{name}: largest difference of a logit", logits, LAYOUT_LOGITS, machine)
    differences = (
        ("the loss", loss, LAYOUT_LOSS),
        (f"the gradient of {where}", gradient, LAYOUT_GRADIENTS),
        ("a logit", logits, LAYOUT_LOGITS),
    )
    return results, [f"{what} is off by {off:.1e}" for what, off, limit in differences if not off < limit.value]


def test_a_missing_reduction_is_seen(alone: Alone) -> None:
    job = _on(alone(CPU_FP32).job, "tp2 etp2")
    results = CPU_FP32.run(2, jobs.with_error, "replicated_gradients_not_summed", jobs.gradients, job)
    assert _gradient_difference(job.layout, results, alone(CPU_FP32).grads)[0] > LAYOUT_GRADIENTS.value


def test_an_error_in_the_logits_under_a_layout_is_seen(alone: Alone, tmp_path: Path) -> None:
    right = alone(CPU_FP32)
    wrong = replace(_on(right.job, "tp2 etp2"), folder=EPSILON_CHANGED.write(right.job.folder, tmp_path / "wrong"))
    logits = _gathered(wrong.layout, CPU_FP32.run(2, jobs.pipeline_logits, wrong))
    assert float((logits - right.logits).abs().max()) > LAYOUT_LOGITS.value
    results = CPU_FP32.run(2, jobs.gradients, wrong)
    assert abs(_loss(wrong.layout, results) / right.grads.loss_sum - 1) > LAYOUT_LOSS.value


def _slices(layout: ParallelLayout, results: list[PassResult], alone: PassResult | None = None) -> dict[str, Tensor]:
    """Return every rank's gradients or, given those of one process, the slices of them that they should be."""
    return {
        f"{name} on rank {rank}": grad if alone is None else _own(layout, rank, name, alone.grads[name], grad)
        for rank, result in enumerate(results)
        for name, grad in result.grads.items()
    }


def _gradient_noise(
    layout: ParallelLayout, results: list[PassResult], right: OneProcess, exact: OneProcess
) -> tuple[float, str]:
    """Return the largest noise of a kind of parameter over that of one process in BF16, and the kind."""
    sides = (_slices(layout, results, one) for one in (None, right.grads, exact.grads))
    return largest_noise_ratio(*sides)


@pytest.mark.parametrize(("name", "machine"), BF16_LAYOUTS)
def test_a_layout_adds_no_noise_in_bf16(alone: Alone, name: str, machine: Machine) -> None:
    job, right, exact = _on(alone(machine).job, name), alone(machine), alone(CPU_FP32)
    results = machine.run(job.layout.world, jobs.gradients, job, timeout=PATIENCE)
    noise, kind = _gradient_noise(job.layout, results, right, exact)
    logits = _gathered(job.layout, machine.run(job.layout.world, jobs.pipeline_logits, job, timeout=PATIENCE))
    logit_noise = noise_ratio(logits, right.logits, exact.logits)
    record(8, f"{name}: gradient noise over that of one process, the largest", noise, BF16_GRADIENTS, machine)
    record(8, f"{name}: logit noise over that of one process", logit_noise, BF16_NOISE, machine)
    assert noise < BF16_GRADIENTS.value, kind
    assert logit_noise < BF16_NOISE.value


def test_a_missing_reduction_is_seen_in_bf16(alone: Alone) -> None:
    job = _on(alone(CPU_BF16).job, "tp2 etp2")
    results = CPU_BF16.run(2, jobs.with_error, "replicated_gradients_not_summed", jobs.gradients, job)
    assert _gradient_noise(job.layout, results, alone(CPU_BF16), alone(CPU_FP32))[0] > BF16_GRADIENTS.value
