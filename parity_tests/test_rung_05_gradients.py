"""Rung 5: the gradient of every parameter, from packed rows, against transformers' autograd on the samples alone.

A failure with logits that agree means the backward pass, the division by the number of target tokens, or samples of a
packed row that see each other.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from parity_tests import jobs, reference
from parity_tests.checkpoints import FAMILIES
from parity_tests.deliberate_errors import EPSILON_CHANGED, GATE_AND_UP_SWAPPED, CheckpointError
from parity_tests.jobs import rows
from parity_tests.machines import BF16, CPU_FP32, FP32, Machine
from parity_tests.passes import largest_noise_ratio
from parity_tests.tolerances import BF16_GRADIENTS, GRADIENTS, record

Checkpoint = Callable[[str], Path]
Theirs = Callable[[Machine], dict[str, Tensor]]
VOCABULARY = 160


def _largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative difference of any parameter's gradient, and the parameter."""
    assert set(ours) == set(theirs)
    return max((_relative(ours[name], theirs[name]), name) for name in theirs)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    if not theirs.any():  # an expert that no token chose
        return float(ours.any())
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint) -> Theirs:
    """Return transformers' gradients for ``small-v3`` on a machine, each computed once."""
    return cache(lambda machine: reference.gradients(checkpoint("small-v3"), rows(VOCABULARY), machine)[1])


@pytest.mark.parametrize("machine", FP32, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_that_of_transformers(checkpoint: Checkpoint, family: str, machine: Machine) -> None:
    (ours,) = machine.run(1, jobs.gradients, machine.job(checkpoint(family)))
    loss, theirs = reference.gradients(checkpoint(family), rows(VOCABULARY), machine)
    difference, name = _largest_difference(ours.grads, theirs)
    record(5, f"{family}: largest relative difference of {len(theirs)} gradients", difference, GRADIENTS, machine)
    assert ours.loss_sum == pytest.approx(loss, rel=1e-5)
    assert difference < GRADIENTS.value, f"{name} is off by {difference:.1e}"
    assert sum(bool(grad.any()) for grad in theirs.values()) > len(theirs) / 4  # the rest: experts no token chose


@pytest.mark.parametrize("error", ["weights_without_gradient", "samples_see_each_other"])
def test_an_error_of_the_backward_pass_is_seen(checkpoint: Checkpoint, theirs: Theirs, error: str) -> None:
    job = CPU_FP32.job(checkpoint("small-v3"))
    (ours,) = CPU_FP32.run(1, jobs.with_error, error, jobs.gradients, job)
    assert _largest_difference(ours.grads, theirs(CPU_FP32))[0] > GRADIENTS.value


@pytest.mark.parametrize("error", [EPSILON_CHANGED, GATE_AND_UP_SWAPPED], ids=["epsilon", "gate and up swapped"])
def test_a_wrong_checkpoint_is_seen_in_the_gradients(
    checkpoint: Checkpoint, theirs: Theirs, tmp_path: Path, error: CheckpointError
) -> None:
    wrong = error.write(checkpoint("small-v3"), tmp_path / "wrong")
    (ours,) = CPU_FP32.run(1, jobs.gradients, CPU_FP32.job(wrong))
    assert _largest_difference(ours.grads, theirs(CPU_FP32))[0] > GRADIENTS.value


@pytest.mark.parametrize("machine", BF16, ids=str)
def test_bf16_gradients_are_no_noisier_than_those_of_transformers(
    checkpoint: Checkpoint, theirs: Theirs, machine: Machine
) -> None:
    (ours,) = machine.run(1, jobs.gradients, machine.job(checkpoint("small-v3")))
    noise, kind = largest_noise_ratio(ours.grads, theirs(machine), theirs(CPU_FP32))
    record(5, f"noise of {kind} over that of transformers, the largest", noise, BF16_GRADIENTS, machine)
    assert noise < BF16_GRADIENTS.value, kind


@pytest.mark.parametrize("machine", BF16, ids=str)
@pytest.mark.parametrize("error", ["weights_without_gradient", "samples_see_each_other"])
def test_an_error_of_the_backward_pass_is_seen_in_bf16(
    checkpoint: Checkpoint, theirs: Theirs, error: str, machine: Machine
) -> None:
    (ours,) = machine.run(1, jobs.with_error, error, jobs.gradients, machine.job(checkpoint("small-v3")))
    assert largest_noise_ratio(ours.grads, theirs(machine), theirs(CPU_FP32))[0] > BF16_GRADIENTS.value
