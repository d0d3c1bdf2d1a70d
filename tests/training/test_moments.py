"""Moments in BF16 through checkpoints: continued bit for bit, over more replicas, and in the other number format."""

import shutil
from pathlib import Path

import pytest

from megatron_ads.config.model import Precision
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, resume_and_train, train, train_and_save
from tests.models.checkpoints import V3, write_checkpoint


def test_a_job_with_bf16_moments_continues_where_it_was_saved(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", V3)

    def recipe(steps: int, moments: Precision) -> Recipe:
        saved = tmp_path / "checkpoints"
        return Recipe(folder=folder, optim={"moments": moments}, checkpoints=saved, steps=steps)

    (straight,) = run_ranks(1, train, recipe(4, Precision.bf16))
    (fp32,) = run_ranks(1, train, recipe(4, Precision.fp32))
    assert straight.loss[0] == fp32.loss[0] and straight.loss[3] != fp32.loss[3]
    assert straight.loss == pytest.approx(fp32.loss, rel=1e-3)
    run_ranks(1, train_and_save, recipe(2, Precision.bf16))
    (resumed,) = run_ranks(1, resume_and_train, recipe(2, Precision.bf16))
    assert (resumed.loss, resumed.grad_norm) == (straight.loss[2:], straight.grad_norm[2:])
    for divided in run_ranks(2, resume_and_train, recipe(2, Precision.bf16)):
        assert divided.loss == pytest.approx(straight.loss[2:], rel=1e-5)
    # From the same state; an update is of moments that are not rounded yet, so the first one is the same too.
    (widened,) = run_ranks(1, resume_and_train, recipe(2, Precision.fp32))
    assert widened.loss == straight.loss[2:]
    shutil.rmtree(tmp_path / "checkpoints")
    run_ranks(1, train_and_save, recipe(2, Precision.fp32))
    (rounded,) = run_ranks(1, resume_and_train, recipe(2, Precision.bf16))
    assert rounded.loss[0] == fp32.loss[2] and rounded.loss[1] != fp32.loss[3]
    assert rounded.loss == pytest.approx(fp32.loss[2:], rel=1e-3)
