"""Rung 5: the gradient of every parameter, from packed rows, against transformers' autograd on the samples alone.

A failure with logits that agree means the backward pass, the division by the number of target tokens, or samples of a
packed row that see each other.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity_tests import jobs, reference
from parity_tests.checkpoint_errors import EPSILON_CHANGED, GATE_AND_UP_SWAPPED, CheckpointError
from parity_tests.checkpoints import FAMILIES
from parity_tests.figures import record
from parity_tests.jobs import Job, rows
from parity_tests.tolerances import GRADIENTS
from tests.distributed import run_ranks

Checkpoint = Callable[[str], Path]
VOCABULARY = 160


def _largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the largest relative difference of any parameter's gradient, and the parameter."""
    assert set(ours) == set(theirs)
    return max((_relative(ours[name], theirs[name]), name) for name in theirs)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if not theirs.any():  # an expert that no token chose
        return float(ours.any())
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_that_of_transformers(checkpoint: Checkpoint, family: str) -> None:
    (ours,) = run_ranks(1, jobs.gradients, Job(folder=checkpoint(family)))
    loss, theirs = reference.gradients(checkpoint(family), rows(VOCABULARY))
    difference, name = _largest_difference(ours.grads, theirs)
    record(5, f"{family}: largest relative difference of {len(theirs)} gradients", difference, GRADIENTS)
    assert ours.loss_sum == pytest.approx(loss, rel=1e-5)
    assert difference < GRADIENTS.value, f"{name} is off by {difference:.1e}"
    assert sum(bool(grad.any()) for grad in theirs.values()) > len(theirs) / 4  # the rest: experts no token chose


@pytest.mark.parametrize("error", ["weights_without_gradient", "samples_see_each_other"])
def test_an_error_of_the_backward_pass_is_seen(checkpoint: Checkpoint, error: str) -> None:
    folder = checkpoint("small-v3")
    (ours,) = run_ranks(1, jobs.with_error, error, jobs.gradients, Job(folder=folder))
    _, theirs = reference.gradients(folder, rows(VOCABULARY))
    assert _largest_difference(ours.grads, theirs)[0] > GRADIENTS.value


@pytest.mark.parametrize("error", [EPSILON_CHANGED, GATE_AND_UP_SWAPPED], ids=["epsilon", "gate and up swapped"])
def test_a_wrong_checkpoint_is_seen_in_the_gradients(
    checkpoint: Checkpoint, tmp_path: Path, error: CheckpointError
) -> None:
    right = checkpoint("small-v3")
    (ours,) = run_ranks(1, jobs.gradients, Job(folder=error.write(right, tmp_path / "wrong")))
    _, theirs = reference.gradients(right, rows(VOCABULARY))
    assert _largest_difference(ours.grads, theirs)[0] > GRADIENTS.value
